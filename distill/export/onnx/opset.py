"""ONNX files for older runtimes: a model of opset 18 said in opset 17, and no more declared than is used."""

from collections.abc import Callable

import onnx
from onnx import helper, numpy_helper

EXPORTED = 18
"""The oldest opset that PyTorch exports. Gelu, which came with 20, is spelled out in it."""

REDUCTIONS = (
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
)


def in_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The same model for runtimes that know an opset; it is changed on the way.

    Args:
        model: of an opset up to 18, or of this very one.
        opset: 17 to 20.

    Raises:
        onnx.checker.ValidationError: it has an operator that the opset lacks.
    """
    if opset < EXPORTED:
        constants = _constants(model.graph)
        for node in model.graph.node:
            if rewrite := _REWRITES.get(node.op_type):
                rewrite(node, constants)
    _drop_unused(model.graph)
    used = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    others = [entry for entry in model.opset_import if entry.domain in used]
    imports = [helper.make_opsetid("", opset), *others]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    model.ir_version = helper.find_min_ir_version_for(imports, ignore_unknown=True)
    onnx.checker.check_model(model, full_check=True)
    return model


def _reduction(node: onnx.NodeProto, constants: dict[str, list[int]]) -> None:
    """Axes were an attribute."""
    axes = constants[node.input[1]] if len(node.input) > 1 and node.input[1] else None
    _leave_out(node, "noop_with_empty_axes")
    del node.input[1:]
    if axes:
        node.attribute.append(helper.make_attribute("axes", axes))


def _split(node: onnx.NodeProto, constants: dict[str, list[int]]) -> None:
    """Into equal parts, one an output, where nothing else is said."""
    _leave_out(node, "num_outputs")


def _pad(node: onnx.NodeProto, constants: dict[str, list[int]]) -> None:
    """All axes are padded."""
    while node.input and not node.input[-1]:
        node.input.pop()


def _resize(node: onnx.NodeProto, constants: dict[str, list[int]]) -> None:
    """Never antialiased, sides as they are said."""
    if not any(entry.i for entry in node.attribute if entry.name == "antialias"):
        _leave_out(node, "antialias")
    if all(entry.s == b"stretch" for entry in node.attribute if entry.name == "keep_aspect_ratio_policy"):
        _leave_out(node, "keep_aspect_ratio_policy")


_REWRITES: dict[str, Callable[[onnx.NodeProto, dict[str, list[int]]], None]] = {
    **dict.fromkeys(REDUCTIONS, _reduction),
    "Split": _split,
    "Pad": _pad,
    "Resize": _resize,
}


def _leave_out(node: onnx.NodeProto, name: str) -> None:
    kept = [entry for entry in node.attribute if entry.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _constants(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """Small lists of whole numbers that the graph holds, by name."""
    found = {each.name: numpy_helper.to_array(each) for each in graph.initializer if each.data_type == each.INT64}
    lists = {name: values.ravel().tolist() for name, values in found.items() if values.size < 16}
    for node in graph.node:
        for entry in node.attribute if node.op_type == "Constant" else ():
            if entry.name == "value_ints":
                lists[node.output[0]] = list(entry.ints)
            elif entry.name == "value" and entry.t.data_type == onnx.TensorProto.INT64:
                lists[node.output[0]] = numpy_helper.to_array(entry.t).ravel().tolist()
    return lists


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Constants that nothing reads any more."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    nodes = [node for node in graph.node if node.op_type != "Constant" or node.output[0] in read]
    weights = [weight for weight in graph.initializer if weight.name in read]
    if len(nodes) < len(graph.node):
        del graph.node[:]
        graph.node.extend(nodes)
    if len(weights) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(weights)
