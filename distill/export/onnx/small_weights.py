"""Weights of an ONNX model that take less space in the file, and are float32 again when a runtime has loaded it."""

import numpy as np
import onnx
from onnx import helper, numpy_helper


def with_float16_weights(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """`model` with half the space for the weights of the operators with these names; it is changed on the way. Each
    goes through a Cast to float32, which runtimes fold as they load the file. A weight beyond float16's range stays."""
    for weight, _ in weights_of(model, names):
        name = weight.name
        with np.errstate(over="ignore"):
            half = numpy_helper.to_array(weight).astype(np.float16)
        if np.isfinite(half).all():
            weight.CopyFrom(numpy_helper.from_array(half, f"{name}_float16"))
            model.graph.node.insert(0, helper.make_node("Cast", [weight.name], [name], to=onnx.TensorProto.FLOAT))
    return model


def with_int8_weights(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """`model` with a quarter of the space for the weights of the operators with these names; it is changed on the way.
    Each is 8 bits times a scale of its output channel, largest magnitude / 127. It is a Cast and a Mul that say so:
    ONNX Runtime (1.31) folds these as it loads the file, a DequantizeLinear it would run for every image."""
    for weight, axis in weights_of(model, names):
        name, values = weight.name, numpy_helper.to_array(weight)
        others = tuple(other for other in range(values.ndim) if other != axis % values.ndim)
        scale = np.abs(values).max(axis=others, keepdims=True) / np.float32(127)
        scale[scale == 0] = 1
        weight.CopyFrom(numpy_helper.from_array(np.rint(values / scale).astype(np.int8), f"{name}_int8"))
        model.graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
        model.graph.node.insert(0, helper.make_node("Mul", [f"{name}_cast", f"{name}_scale"], [name]))
        model.graph.node.insert(0, helper.make_node("Cast", [weight.name], [f"{name}_cast"], to=onnx.TensorProto.FLOAT))
    return model


def weights_of(model: onnx.ModelProto, names: list[str]) -> list[tuple[onnx.TensorProto, int]]:
    """Weights of the operators with these names, and the axis of each along its output channels."""
    axes, wanted = {}, set(names)
    for node in model.graph.node:
        if node.name in wanted and node.op_type in ("Conv", "MatMul", "Gemm"):
            rows = node.op_type == "Conv" or any(entry.name == "transB" and entry.i for entry in node.attribute)
            axes[node.input[1]] = 0 if rows else -1
    return [(weight, axes[weight.name]) for weight in model.graph.initializer if weight.name in axes]
