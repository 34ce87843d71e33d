"""What can be compared: students and SAM's own encoders by name, checkpoints, and exported files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch
from segment_anything.modeling import Sam
from torch import nn

from distill.benchmark.exports import exported_encoders, is_run
from distill.checks import nearest
from distill.export.files import digest as file_digest
from distill.export.files import size as file_size
from distill.run import read_section
from embeddings_cache.system import read_json, sha256
from students import (
    PUBLISHED,
    VITS,
    InputError,
    StudentConfig,
    StudentEncoder,
    build_encoder,
    config_by_name,
    count_macs,
    inspect_checkpoint,
    is_known,
    is_our_student,
    known_architectures,
    list_students,
    load_checkpoint,
    load_student,
    other_sizes,
    require_decoder,
    untrained_sam,
    vit_encoder,
    weight_files,
)

VIT_SIZE = 1024
"""Side of the input that segment-anything's encoders are built for."""

EFFICIENTVIT_SAMS = [name for name in PUBLISHED if name.startswith("efficientvit")]
GROUPS: dict[str, Callable[[], list[str]]] = {
    "recipes": lambda: [
        *("repvit_m0_9", "repvit_m1_1", "repvit_m2_3", "tiny_vit_5m", "repvit_m1_1-pyramid-512"),
        *EFFICIENTVIT_SAMS[:2],
    ],
    "students": lambda: [
        *dict.fromkeys(config.name for config in other_sizes()),
        *EFFICIENTVIT_SAMS,
    ],
    "sam": lambda: list(VITS),
}
"""Names for several at once."""

SUFFIXES = {".onnx": "onnx", ".mlpackage": "coreml", ".safetensors": "torch", ".pth": "torch", ".pt": "torch"}


@dataclass(frozen=True)
class Contender:
    """Something whose cost is asked for.

    Attributes:
        label: what it goes by in tables; no two are equal.
        source: a name, or the path of a file.
        kind: `torch`, `onnx` or `coreml`; a name is `torch`, of which all other kinds can be made.
        image_size: of an encoder that goes by its name, side of the square input in pixels.
    """

    label: str
    source: str
    kind: str
    image_size: int

    @property
    def path(self) -> Path | None:
        """Of its file; None of a name."""
        return Path(self.source) if Path(self.source).suffix in SUFFIXES else None


def find_contenders(names: list[str], image_size: int) -> list[Contender]:
    """Contenders by the names that the command line gives, groups and runs resolved; one that comes twice is told apart
    by its label.

    Raises:
        InputError: a name that is not known, a file that is not there, a run without exported encoders.
    """
    resolved = [
        each
        for name in names
        for each in (GROUPS[name]() if name in GROUPS else exported_encoders(name) if is_run(name) else [name])
    ]
    found: list[Contender] = []
    for source in resolved:
        kind = SUFFIXES.get(Path(source).suffix)
        if kind is None:
            _check_name(source, image_size)
        elif not Path(source).exists():
            raise InputError(f"{source}: no such file")
        times = sum(contender.source == source for contender in found)
        label = f"{source} #{times + 1}" if times else source
        found.append(Contender(label, source, kind or "torch", image_size))
    return found


def _check_name(name: str, image_size: int) -> None:
    if name in VITS:
        if image_size != VIT_SIZE:
            raise InputError(f"{name} takes images of {VIT_SIZE} px only, not image_size={image_size}")
        return
    try:
        config = config_by_name(name, image_size)
    except InputError as error:
        known = [*GROUPS, *known_architectures(), *list_students()]
        raise InputError(f"contender {name!r} is neither known nor a file{nearest(name, known)}") from error
    if image_size % 64 or image_size < 64:
        raise InputError(f"image_size={image_size} is not a multiple of 64")
    with torch.device("meta"):
        build_encoder(config)  # which may refuse it


def refuse_unknown_student(name: str, key: str = "name") -> None:
    """Raise `InputError`, naming the key that asked for it, unless there is such a student."""
    if not is_known(name):
        raise InputError(f"{key}={name} is not known{nearest(name, list_students())}")


def build(contender: Contender) -> tuple[nn.Module, Sam | None]:
    """The encoder of a `torch` contender and a SAM with the decoder that belongs to it; None where its file has none.

    Weights of what goes by a name are drawn, and take as long. So are those of the decoder of a student of ours.
    """
    path = contender.path
    if path is None:
        torch.manual_seed(0)
        name = contender.source
        vit = name in VITS
        encoder: Any = vit_encoder(name, VIT_SIZE) if vit else build_encoder(config_by_name(name, contender.image_size))
        return encoder.eval(), untrained_sam(encoder, int(encoder.img_size)).eval()
    if is_our_student(path):
        student = load_student(path)
        return student, untrained_sam(student, student.img_size, student.embed_dim).eval()
    sam = load_checkpoint(path)
    try:
        require_decoder(sam)
    except InputError:
        return sam.image_encoder, None
    return sam.image_encoder, sam


def facts(contender: Contender) -> dict[str, Any]:
    """What can be said without running it: parameters and multiply-accumulates of the encoder, bytes of its weights,
    and how its masks agree with the teacher's.

    Returns:
        `parameters` and `macs` (branches fused), None where they cannot be counted; `file_bytes`, of a name those of
        float32 weights; `miou_point`, `miou_box`, None where no evaluation of it lies beside the file.
    """
    costs = {"torch": _torch_facts, "onnx": _onnx_facts, "coreml": _coreml_facts}[contender.kind](contender)
    return {**costs, **miou_with_teacher(contender)}


def _torch_facts(contender: Contender) -> dict[str, Any]:
    path, config = contender.path, _config(contender)
    with torch.device("meta"):
        encoder: nn.Module = vit_encoder(*config) if isinstance(config, tuple) else build_encoder(config)
        encoder = encoder.fused() if isinstance(encoder, StudentEncoder) else encoder.eval()
        encoder.requires_grad_(False)
        size = int(encoder.img_size)  # type: ignore[arg-type]
        macs = count_macs(lambda: encoder(torch.zeros(1, 3, size, size)))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return {"parameters": parameters, "macs": macs, "file_bytes": _weight_bytes(path) if path else 4 * parameters}


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(path))


def _config(contender: Contender) -> StudentConfig | tuple[str, int]:
    """Of a student; of segment-anything's own encoders the name and the image size."""
    path = contender.path
    if path is not None and is_our_student(path):
        return load_student(path).config
    name, size = contender.source, contender.image_size
    if path is not None:
        found = inspect_checkpoint(path)
        name, size = found.name, found.image_size
    return (name, size) if name in VITS else config_by_name(name, size)


def _onnx_facts(contender: Contender) -> dict[str, Any]:
    path = Path(contender.source)
    model = onnx.load(path, load_external_data=False)
    files = {path, *(path.parent / name for name in _external_files(model))}
    return {
        "parameters": onnx_parameters(model),
        "macs": onnx_macs(of_one_image(model)),
        "file_bytes": sum(file_size(file) for file in files),
    }


def _coreml_facts(contender: Contender) -> dict[str, Any]:
    return {"parameters": None, "macs": None, "file_bytes": file_size(Path(contender.source))}


def _external_files(model: onnx.ModelProto) -> set[str]:
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return {entry.value for entry in entries if entry.key == "location"}


PRODUCTS = ("Conv", "MatMul", "Gemm")
OTHER_PRODUCTS = {
    "ConvTranspose", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "Einsum", "If", "Loop",
}  # fmt: skip
"""Operators that multiply and are not counted here; where one is, the sum would be wrong."""

WEIGHTS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)


def of_one_image(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with inferred shapes, where it takes one image."""
    first = model.graph.input[0].type.tensor_type.shape.dim[0]
    if not first.dim_value:
        first.dim_value = 1
        del model.graph.value_info[:]  # shapes that depend on the number of images
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def onnx_parameters(model: onnx.ModelProto) -> int:
    """Numbers in the weights of a graph, whatever their type; not its shapes, nor the scales of quantised values."""
    scales = {name for node in model.graph.node if node.op_type.endswith("QuantizeLinear") for name in node.input[1:]}
    return sum(
        prod(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.data_type in WEIGHTS and tensor.name not in scales
    )


def onnx_macs(model: onnx.ModelProto) -> int | None:
    """Multiply-accumulates of a graph's convolutions and matrix products for one image.

    Args:
        model: from `of_one_image`.

    Returns:
        None where a shape that it takes is open, or it has products of another kind.
    """
    if model.functions or any(
        node.domain not in ("", "ai.onnx") or node.op_type in OTHER_PRODUCTS for node in model.graph.node
    ):
        return None
    shapes = _shapes(model)
    total = 0
    for node in model.graph.node:
        if node.op_type not in PRODUCTS:
            continue
        output, weight = shapes.get(node.output[0]), shapes.get(node.input[1])
        if output is None or weight is None:
            return None
        if node.op_type == "Conv":  # (out, in / groups, kernel height, kernel width)
            total += prod(output) * prod(weight[1:])
        else:
            transposed = any(entry.name == "transB" and entry.i for entry in node.attribute)
            total += prod(output) * weight[-1 if transposed else -2]
    return total


def _shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Of every value whose shape is known."""
    graph = model.graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        sizes = [size.dim_value for size in value.type.tensor_type.shape.dim]
        if all(sizes):
            shapes[value.name] = sizes
    return shapes


def miou_with_teacher(contender: Contender) -> dict[str, float | None]:
    """Mean IoU of the student's masks with the teacher's, from the evaluation in its run directory, if it is of these
    very weights: a checkpoint's, or those of the float files that `manifest.json` says were made of them."""
    nothing: dict[str, float | None] = {"miou_point": None, "miou_box": None}
    path = contender.path
    if path is None:
        return nothing
    manifest, beside = path.parent / "manifest.json", path.parent / "evaluation.json"
    if contender.kind != "torch":
        if not manifest.exists():
            return nothing
        digest, beside = _made_from(path, read_json(manifest)), path.parent.parent / "evaluation.json"
    if (evaluation := read_section(beside, "masks")) is None:
        return nothing
    if contender.kind == "torch":
        digest = sha256(path)
    if digest is None or _dig(evaluation, "made_from", "student_sha256") != digest:
        return nothing
    return {f"miou_{prompt}": _dig(evaluation, "miou", prompt, "all", "student_teacher") for prompt in ("point", "box")}


def _made_from(path: Path, manifest: Any) -> str | None:
    """SHA-256 of the student that an exported file holds; None where its weights are not the student's any more."""
    entry = _dig(manifest, "files", path.name)
    if _dig(entry, "sha256") != file_digest(path) or "int8" in entry["precision"] or "bits" in entry["precision"]:
        return None
    return _dig(manifest, "made_from", "student_sha256")


def _dig(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
