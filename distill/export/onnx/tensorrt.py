"""`encoder_trt.onnx` and `decoder_trt.onnx`: graphs for TensorRT's strongly typed networks, which take every type from
the graph: float16, and float32 where float16 overflows or loses too much."""

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from distill.export.onnx.batch import export_batch_decoder
from distill.export.onnx.encoder import describe_encoder, onnx_encode
from distill.export.onnx.float16 import in_float16
from distill.export.proof import FLOAT16, Bounds, ParityError, Reference, within
from embeddings_cache.system import whole_file

IN_FLOAT32 = ("LayerNormalization", "Softmax", "ReduceMean", "ReduceSum", "ReduceL2", "Pow", "Sqrt")
"""Operators that keep float32: sums over many values, and squares, which exceed float16 beyond 255."""

TURNS = ("Sin", "Cos")
"""Operators that keep float32 with all that leads to them: places of points, at 1024 px half a pixel in float16."""

TAKEN = {
    "Abs", "Add", "And", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape",
    "Conv", "ConvTranspose", "Cos", "DepthToSpace", "Div", "Equal", "Erf", "Exp", "Expand", "Flatten", "Gather",
    "GatherND", "Gemm", "GlobalAveragePool", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity",
    "LayerNormalization", "Less", "LessOrEqual", "MatMul", "Max", "MaxPool", "Min", "Mul", "Neg", "Not", "Or", "Pad",
    "Pow", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Resize", "Shape", "Sigmoid", "Sin",
    "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
"""Operators of the support matrix of TensorRT's ONNX parser (github.com/onnx/onnx-tensorrt, docs/operators.md) that
have outputs whose size is known from those of the inputs."""

PRECISION = "float16, norms in float32"

DECODER_BOUNDS = Bounds(mask_miou=0.99, iou_difference=2e-2)


def export_trt_encoder(model: onnx.ModelProto, reference: Reference, path: Path) -> dict[str, Any]:
    """Write an encoder for TensorRT, from `encoder_model`.

    Raises:
        ParityError: the file does not reproduce the encoder, or holds what TensorRT refuses.
    """
    with whole_file(path) as temporary:
        onnx.save(for_tensorrt(model, path.name), temporary)
        parity = within(path.name, reference.parity(onnx_encode(temporary)), FLOAT16)
        return {**describe_encoder(temporary), "precision": PRECISION, "parity": parity}


def export_trt_decoder(model: onnx.ModelProto, reference: Reference, path: Path) -> dict[str, Any]:
    """Write a decoder for TensorRT, from `batch_decoder_model`.

    Raises:
        ParityError: the file does not do what `SamPredictor` does, or holds what TensorRT refuses.
    """
    model = for_tensorrt(model, path.name)
    return export_batch_decoder(model, reference, path, DECODER_BOUNDS, PRECISION)


def for_tensorrt(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """A float32 model in float16, but for `IN_FLOAT32` and `TURNS`; inputs and outputs stay float32."""
    model = in_float16(model, IN_FLOAT32, TURNS)
    if reason := refused_by_tensorrt(model):
        raise ParityError(f"{name} holds what TensorRT does not take: {reason}")
    return model


def refused_by_tensorrt(model: onnx.ModelProto) -> str | None:
    """What of a model TensorRT does not take, None where nothing is known: float64, other operators than `TAKEN`, and
    so branches and other domains, and outputs whose size depends on values."""
    values = [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    casts = [a.i for node in model.graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"]
    if TensorProto.DOUBLE in [*(tensor.data_type for tensor in [*model.graph.initializer, *values]), *casts]:
        return "float64"
    others = {f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph.node} - TAKEN
    if others:
        return ", ".join(sorted(others))
    known = {dim for value in model.graph.input for dim in _open(value)}
    sizes = [f"the size of {value.name}" for value in model.graph.output if not known.issuperset(_open(value))]
    return ", ".join(sizes) or None


def _open(value: onnx.ValueInfoProto) -> list[str]:
    """The names of a value's dimensions that are not fixed."""
    return [dim.dim_param for dim in value.type.tensor_type.shape.dim if not dim.HasField("dim_value")]
