"""`transformers_js/`: a SAM as transformers.js loads it, in Node and in browsers."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from segment_anything.modeling import Sam

from distill.clients import write_client
from distill.export.files import digest, size, whole_directory
from distill.export.hub.files import write_text_json
from distill.export.onnx import (
    export_int8_encoder,
    export_prompt_decoder,
    export_vision_encoder,
    in_float16,
    in_opset,
    marked,
    prompt_model,
    prompt_model_in,
    vision_model,
)
from distill.export.proof import ParityError, Reference
from distill.export.subject import Subject, unfit
from students import InputError, hugging_face_decoder_config, hugging_face_preprocessing

ENDS = {"float32": "", "float16": "_fp16", "int8": "_quantized"}
"""What transformers.js puts behind a file's name for `dtype` fp32, fp16 and q8."""

ENCODER, DECODER = "vision_encoder", "prompt_encoder_mask_decoder"

LANCZOS = 1
"""What transformers.js is told to resize by, which it heeds in Node: its bilinear way (2) skips pixels there, and this
is the one that averages over those that become one, as Pillow's bilinear does, which the student learnt from."""

BROWSERS_DEFAULT = "int8"
"""What it loads in a browser without WebGPU, where nobody says `dtype`."""


def export_transformers_js(
    path: Path,
    subject: Subject,
    reference: Reference,
    encoder: Callable[[], onnx.ModelProto],
    pictures: list[np.ndarray],
    opset: int,
    gate: Callable[[], Reference],
) -> dict[str, Any]:
    """Write the folder: encoder and decoder in three precisions, what transformers.js reads beside them, a README.

    A file in float16 or 8 bits whose masks differ too much is left out, with the reason in README and manifest, and
    browsers take another one then.

    Args:
        path: of the folder.
        subject: with a decoder.
        reference: what PyTorch makes of some images, with a decoder.
        encoder: makes an `encoder_model` of any number of images and the newest opset.
        pictures: RGB uint8 (h, w, 3) to find the ranges of activations with.
        opset: of the files.
        gate: what PyTorch makes of more images, which decide about 8 bits.

    Returns:
        What the manifest says.

    Raises:
        InputError: `export.input=native`: transformers.js resizes a picture to the size whose pixels prompts are in.
        ParityError: a file in float32 does not do what the student does.
    """
    sam = subject.sam
    assert sam is not None
    if reason := unfit("transformers_js", subject):
        raise InputError(reason)

    def compared(precision: str) -> Reference:
        return gate() if precision == "int8" else reference

    decoder = marked(prompt_model(sam, opset), subject.marks)
    files: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    with whole_directory(path) as folder:
        (folder / "onnx").mkdir(parents=True)
        for precision, end in ENDS.items():
            for kind in (ENCODER, DECODER):
                name = f"onnx/{kind}{end}.onnx"
                file = folder / name
                try:
                    if kind == ENCODER:
                        made, speed = _encoder_in(precision, encoder, reference, pictures, opset, gate)
                        described = export_vision_encoder(vision_model(made, sam), compared(precision), file, precision)
                        described |= speed
                    else:
                        model = prompt_model_in(precision, decoder)
                        described = export_prompt_decoder(model, compared(precision), file, precision)
                except ParityError as error:
                    if precision == "float32":
                        raise
                    left_out[name] = str(error)
                    continue
                files[name] = {"sha256": digest(file), "bytes": size(file), **described}
        write_text_json(folder / "config.json", _config(sam, subject, files))
        processing = {**hugging_face_preprocessing(sam), "resample": LANCZOS}
        write_text_json(folder / "preprocessor_config.json", processing)
        write_client("transformers_js", folder, _facts(subject, files, left_out))
        contents = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return {
        "format": "folder",
        "precision": "float32",
        "contents": contents,
        "files": files,
        "left_out": left_out,
        "parity": files[f"onnx/{ENCODER}.onnx"]["parity"],
    }


def _encoder_in(
    precision: str,
    encoder: Callable[[], onnx.ModelProto],
    reference: Reference,
    pictures: list[np.ndarray],
    opset: int,
    gate: Callable[[], Reference],
) -> tuple[onnx.ModelProto, dict[str, float]]:
    """An encoder of RGB 0–255 in a precision, and of 8 bits how fast that is.

    Raises:
        ParityError: 8 bits are not enough.
    """
    if precision == "int8":
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "encoder_int8.onnx"
            described = export_int8_encoder(encoder(), reference, path, pictures, opset, gate())
            return onnx.load(path), {"times_as_fast": described["times_as_fast"]}
    copy = onnx.ModelProto()
    copy.CopyFrom(encoder())
    model = in_opset(copy, opset)
    return in_float16(model) if precision == "float16" else model, {}


def _config(sam: Sam, subject: Subject, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`config.json`; what browsers take where the file of their default was left out, or is no faster."""
    cells = sam.prompt_encoder.image_embedding_size[0]
    config: dict[str, Any] = {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": {
            "image_size": subject.image_size,
            "patch_size": subject.image_size // cells,
            "output_channels": subject.channels,
        },
        **hugging_face_decoder_config(sam),
    }
    names = {kind: f"onnx/{kind}{ENDS[BROWSERS_DEFAULT]}.onnx" for kind in (ENCODER, DECODER)}
    good = {kind: name in files and files[name].get("times_as_fast", 2) > 1 for kind, name in names.items()}
    if not all(good.values()):
        instead = {kind: "q8" if found else "fp32" for kind, found in good.items()}
        config["transformers.js_config"] = {"device_config": {"wasm": {"dtype": instead}}}
    return config


def _facts(subject: Subject, files: dict[str, dict[str, Any]], left_out: dict[str, str]) -> dict[str, str | int]:
    rows = [
        f"| `{name}` | {file['bytes'] / 1e6:.1f} MB | {file['precision']} | {file['parity']['mask_miou']:.4f} |"
        for name, file in files.items()
    ]
    return {
        "title": subject.name,
        "size": subject.image_size,
        "channels": subject.channels or 0,
        "fingerprint": subject.fingerprint or "",
        "files": "\n".join(rows),
        "left_out": "\n".join(f"- `{name}`: {reason}" for name, reason in left_out.items()),
    }
