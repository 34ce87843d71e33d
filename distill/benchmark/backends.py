"""What runs an encoder: each backend makes of a contender something that can be timed.

All are given the same and return the same: RGB 0–255 (B, 3, S, S) in the host's memory, padded with the mean colour and
normalised inside; the embedding (B, C, S/16, S/16) in the host's memory.
"""

import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from PIL import Image
from torch import nn

from distill.benchmark.contenders import Contender, build
from distill.export.coreml import Origin, convert_decoder, convert_encoder, decoder_feeds, require_coremltools
from distill.export.decoder import PromptDecoder
from distill.export.encoder import RgbEncoder
from distill.export.onnx import encoder_model, low_res_model, open_session
from students import InputError, first_line

PROMPT = {
    "point_coords": np.array([[[300.0, 200.0], [0.0, 0.0]]], dtype=np.float32),
    "point_labels": np.array([[1.0, -1.0]], dtype=np.float32),
}
"""One point, and the end of a prompt without a box."""


@dataclass
class Runner:
    """A contender, ready on a backend.

    Attributes:
        image_size: side S of the square input in pixels.
        feed: RGB uint8 (B, 3, S, S) as the backend takes it; not timed.
        encode: of what `feed` returns, the embedding as float (B, C, S/16, S/16).
        decode: of an embedding float32 (1, C, S/16, S/16), the low-resolution masks of one point; or why there is none.
        batches: whether it takes several images at once.
    """

    image_size: int
    feed: Callable[[np.ndarray], Any]
    encode: Callable[[Any], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray] | str
    batches: bool


@dataclass(frozen=True)
class Backend:
    """A way to run contenders.

    Attributes:
        kinds: of contenders that it runs.
        missing: why it cannot run here, or None.
        load: makes a runner, from what `prepare` left in a folder.
        prepare: makes files of a contender in a folder, once; in a process of its own.
    """

    kinds: tuple[str, ...]
    missing: Callable[[], str | None]
    load: Callable[[Contender, Path, int], Runner]
    prepare: Callable[[Contender, Path], None] | None = None


def load_torch(contender: Contender, folder: Path, threads: int, device: str = "cpu", compiled: bool = False) -> Runner:
    """PyTorch, branches fused; weights with channels last, as convolutions are fastest."""
    encoder, sam = build(contender)
    size = int(encoder.img_size)  # type: ignore[arg-type]
    place = torch.device(device)
    rgb = RgbEncoder(encoder).eval().requires_grad_(False).to(place).to(memory_format=torch.channels_last)
    decoder = None if sam is None else PromptDecoder(sam).eval().requires_grad_(False).to(place)
    if compiled:
        rgb.compile(dynamic=False)
        if decoder is not None:
            decoder.compile(dynamic=False)

    @torch.no_grad()
    def encode(image: torch.Tensor) -> np.ndarray:
        return rgb(image.to(place)).contiguous().cpu().numpy()

    @torch.no_grad()
    def decode(embedding: np.ndarray, decoder: nn.Module | None = decoder) -> np.ndarray:
        assert decoder is not None
        tensors = [torch.from_numpy(array).to(place) for array in (embedding, *PROMPT.values())]
        return decoder(*tensors)[0].cpu().numpy()

    return Runner(
        size,
        lambda pixels: torch.from_numpy(pixels).float(),
        encode,
        decode if decoder else "its file has no decoder",
        batches=not compiled,
    )


def prepare_onnx(contender: Contender, folder: Path) -> None:
    """Encoder and decoder as the export stage makes them, here of any number of images; not compared with PyTorch."""
    encoder, sam = build(contender)
    onnx.save(encoder_model(RgbEncoder(encoder).eval(), dynamic_batch=True), folder / "encoder.onnx")
    if sam is not None:
        onnx.save(low_res_model(sam, single=False), folder / "decoder.onnx")


def onnx_files(contender: Contender, folder: Path) -> tuple[Path, Path]:
    """Encoder and decoder: the contender's own file and what lies beside it, or those that were made of it."""
    if contender.kind == "onnx":
        path = Path(contender.source)
        return path, path.with_name("decoder.onnx")
    return folder / "encoder.onnx", folder / "decoder.onnx"


def load_onnxruntime(
    contender: Contender, folder: Path, threads: int, provider: str = "CPUExecutionProvider"
) -> Runner:
    """ONNX Runtime; a session for each number of images, which it is told, as an export of one image says it."""
    path, decoder_path = onnx_files(contender, folder)
    opening = onnx_images(path)
    sessions: dict[int, onnxruntime.InferenceSession] = {}

    def session(images: int) -> onnxruntime.InferenceSession:
        if images not in sessions:
            sessions.clear()
            sizes = {opening: images} if isinstance(opening, str) and opening else {}
            sessions[images] = open_session(path, provider, sizes, intra_op_num_threads=threads)
            found = sessions[images].get_providers()[0]
            if found != provider:
                raise InputError(f"ONNX Runtime took {found} instead of {provider}")
        return sessions[images]

    image = session(1).get_inputs()[0]
    if image.name != "image" or len(image.shape) != 4 or image.shape[2] != image.shape[3]:
        raise InputError(f"{path} does not take an image (N, 3, S, S): it has {image.name} {image.shape}")
    decoder = cache(lambda: open_session(decoder_path, provider, intra_op_num_threads=threads))

    def encode(pixels: np.ndarray) -> np.ndarray:
        return session(len(pixels)).run(None, {"image": pixels})[0]

    def decode(embedding: np.ndarray) -> np.ndarray:
        inputs = decoder_inputs(embedding)
        taken = {each.name: inputs[each.name] for each in decoder().get_inputs()}
        return decoder().run(["low_res_masks"], taken)[0]

    return Runner(
        image.shape[2],
        lambda pixels: pixels.astype(np.float32),
        encode,
        decode if decoder_path.exists() else f"no decoder.onnx beside {path.name}",
        batches=isinstance(opening, str),
    )


def onnx_images(path: Path) -> int | str:
    """How many images a file takes: a number, or the name of an open dimension, which may be empty.

    Raises:
        InputError: it is no ONNX file.
    """
    try:
        shape = onnx.load(path, load_external_data=False).graph.input[0].type.tensor_type.shape
    except (DecodeError, IndexError) as error:
        raise InputError(f"{path} cannot be read as ONNX: {first_line(error)}") from error
    return shape.dim[0].dim_value or shape.dim[0].dim_param


def decoder_inputs(embedding: np.ndarray) -> dict[str, np.ndarray]:
    """All that a decoder with segment-anything's inputs may ask for: a point, no earlier mask, an image of S × S."""
    cells = embedding.shape[-1]
    return {
        "image_embeddings": embedding,
        **PROMPT,
        "mask_input": np.zeros((1, 1, 4 * cells, 4 * cells), dtype=np.float32),
        "has_mask_input": np.zeros(1, dtype=np.float32),
        "orig_im_size": np.array([16 * cells, 16 * cells], dtype=np.float32),
    }


def load_openvino(contender: Contender, folder: Path, threads: int) -> Runner:
    """OpenVINO on the CPU, for short latency, in float32 where the file is."""
    import openvino

    path, decoder_path = onnx_files(contender, folder)
    core, settings = openvino.Core(), {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    model = core.read_model(path)
    size = model.inputs[0].get_partial_shape()[2].get_length()
    batches = model.inputs[0].get_partial_shape()[0].is_dynamic
    compiled: dict[int, Any] = {}

    def encode(pixels: np.ndarray) -> np.ndarray:
        if len(pixels) not in compiled:
            compiled.clear()
            if batches:
                model.reshape([len(pixels), 3, size, size])
            compiled[len(pixels)] = core.compile_model(model, "CPU", settings)
        return compiled[len(pixels)]({"image": pixels})[0]

    decoder = cache(lambda: core.compile_model(core.read_model(decoder_path), "CPU", settings))

    def decode(embedding: np.ndarray) -> np.ndarray:
        inputs = decoder_inputs(embedding)
        return decoder()({each.any_name: inputs[each.any_name] for each in decoder().inputs})["low_res_masks"]

    reason = f"no decoder.onnx beside {path.name}"
    return Runner(
        size, lambda pixels: pixels.astype(np.float32), encode, decode if decoder_path.exists() else reason, batches
    )


def prepare_coreml(contender: Contender, folder: Path) -> None:
    """Encoder and decoder as the export stage makes them; not compared with PyTorch."""
    encoder, sam = build(contender)
    origin = Origin(contender.source, "none", None)
    model = convert_encoder(RgbEncoder(encoder, eight_bit=True).eval())
    origin.write_to(model, "for measuring")
    model.save(str(folder / "Encoder.mlpackage"))
    if sam is not None:
        convert_decoder(sam).save(str(folder / "Decoder.mlpackage"))


def load_coreml(contender: Contender, folder: Path, threads: int, unit: str = "ALL") -> Runner:
    """Core ML itself, on the compute units that are named."""
    ct = require_coremltools()
    path = Path(contender.source) if contender.kind == "coreml" else folder / "Encoder.mlpackage"
    units = ct.ComputeUnit[unit]
    model = ct.models.MLModel(str(path), compute_units=units)
    size = model.get_spec().description.input[0].type.imageType.width
    decoder_path = path.with_name(re.sub(r"Encoder(_\d+bit)?\.mlpackage$", "Decoder.mlpackage", path.name))
    decoder = cache(lambda: ct.models.MLModel(str(decoder_path), compute_units=units))

    def decode(embedding: np.ndarray) -> np.ndarray:
        return decoder().predict(decoder_feeds(embedding, *PROMPT.values()))["low_res_masks"]

    return Runner(
        size,
        lambda pixels: Image.fromarray(np.ascontiguousarray(pixels[0].transpose(1, 2, 0))),
        lambda image: model.predict({"image": image})["image_embeddings"],
        decode if decoder_path.exists() else f"no {decoder_path.name} beside {path.name}",
        batches=False,
    )


def _without_provider(provider: str) -> str | None:
    missing = provider not in onnxruntime.get_available_providers()
    return f"this onnxruntime has no {provider}" if missing else None


def _without_compiler() -> str | None:
    return None if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") else "there is no C++ compiler"


def _without_gpu() -> str | None:
    return None if torch.cuda.is_available() else "this PyTorch finds no GPU"


def _without_openvino() -> str | None:
    return None if find_spec("openvino") else "openvino is not installed (pip install openvino)"


def _without_coreml() -> str | None:
    return None if platform.system() == "Darwin" else "Core ML runs on macOS only"


def _torch(missing: Callable[[], str | None], **options: Any) -> Backend:
    return Backend(("torch",), missing, partial(load_torch, **options))


def _onnxruntime(provider: str) -> Backend:
    load = partial(load_onnxruntime, provider=provider)
    return Backend(("torch", "onnx"), partial(_without_provider, provider), load, prepare_onnx)


def _coreml(unit: str) -> Backend:
    return Backend(("torch", "coreml"), _without_coreml, partial(load_coreml, unit=unit), prepare_coreml)


BACKENDS: dict[str, Backend] = {
    "eager": _torch(lambda: None),
    "compiled": _torch(_without_compiler, compiled=True),
    "eager-cuda": _torch(_without_gpu, device="cuda"),
    "compiled-cuda": _torch(_without_gpu, device="cuda", compiled=True),
    "onnxruntime": _onnxruntime("CPUExecutionProvider"),
    "onnxruntime-cuda": _onnxruntime("CUDAExecutionProvider"),
    "onnxruntime-coreml": _onnxruntime("CoreMLExecutionProvider"),
    "openvino": Backend(("torch", "onnx"), _without_openvino, load_openvino, prepare_onnx),
    "coreml-all": _coreml("ALL"),
    "coreml-cpu": _coreml("CPU_ONLY"),
    "coreml-gpu": _coreml("CPU_AND_GPU"),
    "coreml-ane": _coreml("CPU_AND_NE"),
}

MINUTES = ("compiled", "compiled-cuda")
"""Backends that take a minute or more to get ready, and run only where they are asked for."""
