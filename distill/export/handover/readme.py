"""`export/README.md`, for the person who receives the folder."""

import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from distill.export.card import iou
from distill.export.coreml import MAX_POINTS, PADDING_COLOUR
from distill.export.programs import encoder_of_programs
from distill.export.swift import packages_of
from distill.schema import FORMATS
from embeddings_cache.system import whole_file

CLIENTS = {
    "cvat": "CVAT's plugin for Segment Anything, a Nuclio function, and an agent for CVAT Online",
    "anylabeling": "AnyLabeling, X-AnyLabeling and samexporter",
    "label_studio": "a backend for Label Studio",
    "transformers_js": "transformers.js, in Node and in browsers",
    "huggingface": "transformers, and a repository on the Hugging Face hub, with a model card",
    "web": "a page for browsers, which any web server hands out",
}
"""Folders among the files, and whom they are for."""


ENGINES = FORMATS["onnx_trt"]
"""Files for TensorRT."""

WHOLE_DECODERS = ("decoder.onnx", "decoder_multimask.onnx")
"""Those that complete a prompt, and give masks at the image's size."""


def write_readme(path: Path, manifest: dict[str, Any]) -> None:
    """Describe an export's files, and how they are used from Python, JavaScript, Swift and TensorRT."""
    made = manifest["files"]
    files = made | {f"{folder}/{name}": file for folder in made for name, file in made[folder].get("files", {}).items()}
    encoders = [name for name in made if name.startswith("encoder")]
    jinja = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    jinja.filters |= {"code": "`{}`".format, "iou": iou}
    text = jinja.from_string(_resource("README.md.jinja")).render(
        manifest={"failures": [], "left_out": {}, "beside": {}, **manifest},
        card=manifest.get("card"),
        uses=_uses(made),
        tensors=_tensors(made),
        folders=[name for name, entry in manifest.get("beside", {}).items() if entry.get("format") == "folder"],
        made=made,
        images_from=next((file["parity"].get("images_from") for file in made.values()), None),
        size=manifest["student"]["image_size"],
        side=manifest["student"]["input_size"],
        rounded=PADDING_COLOUR,
        max_points=MAX_POINTS,
        onnx=[name for name in made if name.endswith(".onnx")],
        packages=[name for name in made if name.endswith(".mlpackage")],
        coreml_encoder=next((name for name in made if name.endswith("Encoder.mlpackage")), None),
        coreml_decoder=next((name for name in made if name.endswith("Decoder.mlpackage")), None),
        compressed=[(name, file) for name, file in made.items() if "mask_iou_p5" in file["parity"].get("allowed", {})],
        decoders=[name for name in files if "decoder" in name.rsplit("/")[-1].lower()],
        onnx_encoders=[name for name in encoders if name not in ENGINES],
        onnx_decoders=[name for name in made if name in WHOLE_DECODERS],
        engines=[name for name in made if name in ENGINES],
        opset=next((file["opset"] for name, file in files.items() if name.endswith(".onnx")), None),
        clients={name: whom for name, whom in CLIENTS.items() if name in made},
        dynamic=any(not isinstance(made[name]["inputs"]["image"]["shape"][0], int) for name in encoders),
        on_a_mac=any("runtime" in file["parity"] for file in made.values()),
        encoder=encoder_of_programs(made),
        programs="segment.py" in manifest.get("beside", {}),
        latencies=[{"file": name, **found} for name, file in made.items() for found in file.get("latency", ())],
        apps=packages_of(made),
        swift=swift_snippet(made),
    )
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _uses(made: dict[str, Any]) -> list[tuple[str, str]]:
    """Where it may run, and the files for that."""

    def pair(encoder: str, decoder: str = "decoder.onnx") -> list[str]:
        return [name for name in (encoder, decoder) if name in made] if encoder in made else []

    faster = made.get("encoder_int8.onnx", {}).get("times_as_fast", 0)
    apple = list(packages_of(made) or ())
    smaller = [name for name in made if re.search(r"Encoder_\w+\.mlpackage$", name) and name not in apple]
    uses = [
        ("a processor: ONNX Runtime for Python, Node, C++, C# and others", pair("encoder.onnx")),
        (
            f"a processor, {faster} times as fast on one core of the machine that made it",
            pair("encoder_int8.onnx") if faster > 1 else [],
        ),
        ("a GPU: ONNX Runtime with CUDA (`onnxruntime-gpu`)", pair("encoder_fp16.onnx")),
        ("an NVIDIA GPU: TensorRT", pair(*ENGINES)),
        ("a browser, as a page that is ready", [name for name in ("web",) if name in made]),
        ("a browser, as part of a page", pair("encoder.onnx")),
        ("iPhone, iPad, Mac", apple),
        ("iPhone, iPad, Mac, in the encoder's place, for a smaller download", smaller if apple else []),
        ("many prompts on one picture at once", [name for name in ("decoder_batch.onnx",) if name in made]),
    ]
    return [(where, ", ".join(f"`{name}`" for name in names)) for where, names in uses if names]


def _tensors(made: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Inputs and outputs of encoders and decoders, those that have the same in one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, file in made.items():
        if "inputs" in file:
            sides = (", ".join(_tensor(*each) for each in file[side].items()) for side in ("inputs", "outputs"))
            rows.setdefault((next(sides), next(sides)), []).append(f"`{name}`")
    return [(", ".join(names), *sides) for sides, names in rows.items()]


def _tensor(name: str, tensor: dict[str, Any]) -> str:
    kind = "" if tensor["dtype"] == "float32" else f" {tensor['dtype']}"
    return f"`{name}` {' × '.join(map(str, tensor['shape']))}{kind}"


def swift_snippet(made: Iterable[str]) -> str:
    """An app's code, for the packages of this export; nothing where there are none."""
    text, packages = _resource("snippets/Segment.swift").strip(), packages_of(made)
    for word, package in zip(("ENCODER", "DECODER"), packages or (), strict=False):
        text = text.replace(word, package.removesuffix(".mlpackage"))
    return text if packages else ""


def _resource(name: str) -> str:
    return (files("distill.export.handover") / name).read_text(encoding="utf-8")
