"""A float32 model in float16, whose inputs and outputs stay float32."""

from collections.abc import Collection
from copy import deepcopy

import onnx
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from distill.export.quiet import quietly


def in_float16(model: onnx.ModelProto, keep: Collection[str] = (), leading_to: Collection[str] = ()) -> onnx.ModelProto:
    """A copy that computes in float16.

    Args:
        model: in float32.
        keep: operators that keep float32, beside those that have no float16.
        leading_to: operators that keep float32 with all that their values are computed by.
    """
    with quietly("onnxruntime"):
        half = convert_float_to_float16(
            deepcopy(model),
            keep_io_types=True,
            disable_shape_infer=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *keep],
            node_block_list=sorted(node.name for node in _before(model, leading_to)),
        )
    OnnxModel(half).topological_sort()  # as ONNX wants it, and ONNX Runtime does not: casts come last
    del half.graph.value_info[:]  # some say float16 of what stays float32
    return half


def _before(model: onnx.ModelProto, operators: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes of some operators, and all that their values are computed by."""
    found: list[onnx.NodeProto] = []
    wanted: set[str] = set()
    for node in reversed(model.graph.node):  # which are in order
        if node.op_type in operators or wanted.intersection(node.output):
            found.append(node)
            wanted.update(node.input)
    return found
