"""ONNX files for older runtimes: a model of opset 20 said in an earlier one, and no more declared than is used.

ONNX's own converter has no way down for `Pad`. Only what models here are made of is rewritten; the checker refuses the
rest, and every file is run before it is kept.
"""

import math
from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

EXPORTED = 20
"""What PyTorch is asked for: the first opset with Gelu, which is then spelled out as ONNX Runtime recognises it. As
PyTorch spells it out ONNX Runtime (1.32) does not, and RepViT-M0.9 takes 1.27 times as long."""

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
        model: of opset 20, or of this very one.
        opset: 17 to 20.

    Raises:
        onnx.checker.ValidationError: it has an operator that the opset lacks.
    """
    if opset < 20:
        _spell_out_gelu(model.graph)
    if opset < 18:
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


Step = tuple[str, tuple[str | int | float, ...]]
"""An operator, and what it takes: x, what an earlier step makes, by its number, or a number (float)."""

EXACT_GELU: tuple[Step, ...] = (
    ("Div", ("x", 2**0.5)), ("Erf", (0,)), ("Add", (1, 1.0)), ("Mul", ("x", 2)), ("Mul", (3, 0.5)),
)  # fmt: skip
"""x · (1 + erf(x ÷ √2)) · ½, in the order by which ONNX Runtime knows it for a Gelu (core/optimizer/gelu_fusion.cc)."""

TANH_GELU: tuple[Step, ...] = (
    ("Mul", ("x", 0.044715)), ("Mul", (0, "x")), ("Add", (1, 1.0)), ("Mul", ("x", (2 / math.pi) ** 0.5)),
    ("Mul", (3, 2)), ("Tanh", (4,)), ("Add", (5, 1.0)), ("Mul", ("x", 0.5)), ("Mul", (7, 6)),
)  # fmt: skip
"""½x · (1 + tanh(√(2/π) · x · (1 + 0.044715 x²))), likewise (fast_gelu_fusion.cc)."""


def _spell_out_gelu(graph: onnx.GraphProto) -> None:
    numbers: dict[str, float] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "Gelu":
            nodes.append(node)
            continue
        ((x,), (y,)) = node.input, node.output
        steps = TANH_GELU if any(entry.s == b"tanh" for entry in node.attribute) else EXACT_GELU
        made = [*(f"{y}.step{number}" for number in range(len(steps) - 1)), y]
        for (kind, operands), out in zip(steps, made, strict=True):
            numbers |= {f"number_{operand}": operand for operand in operands if isinstance(operand, float)}
            names = [made[o] if isinstance(o, int) else x if o == "x" else f"number_{o}" for o in operands]
            nodes.append(helper.make_node(kind, names, [out], name=f"{out}_{kind}"))
    values = {name: np.array(number, np.float32) for name, number in numbers.items()}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    if numbers:
        del graph.node[:]
        graph.node.extend(nodes)


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
