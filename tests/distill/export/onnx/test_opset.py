"""Models said in the operators of older opsets."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from distill.export.onnx.file import onnx_model, open_session
from distill.export.onnx.opset import in_opset


class Twice(nn.Module):
    """An activation between convolutions, twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.gelu = nn.GELU(approximate=kind)
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.convs
        return third(self.gelu(second(self.gelu(first(x)))))


@pytest.mark.parametrize(("kind", "operator"), [("none", "Gelu"), ("tanh", "FastGelu")])
def test_activations_that_are_spelled_out_are_put_together_again(kind: str, operator: str, tmp_path: Path) -> None:
    """By ONNX Runtime: as PyTorch spells them out they stay so, and RepViT takes a quarter more time."""
    module, x = Twice(kind).eval().requires_grad_(False), torch.linspace(-6, 6, 96).reshape(1, 3, 4, 8)
    model = onnx_model(module, (x,), 17)
    optimized = tmp_path / "optimized.onnx"
    session = open_session(model.SerializeToString(), optimized_model_filepath=str(optimized))
    kinds = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    assert kinds[operator] == 2
    assert not {"Erf", "Tanh"} & set(kinds)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, module(x).numpy(), atol=2e-6)


class Reduced(nn.Module):
    """What has other inputs or attributes since opset 18."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.amax(3, keepdim=True).chunk(2, dim=1)
        padded = nn.functional.pad(
            x[:, :2].mean((2, 3), keepdim=True) + first.amin(1, keepdim=True) + second, (1, 2, 3, 0)
        )
        return nn.functional.interpolate(padded, scale_factor=2.0, mode="bilinear") + x.square().sum((1, 2, 3))


@pytest.mark.parametrize("opset", [17, 18, 19, 20])
def test_every_opset_computes_the_same(opset: int) -> None:
    x = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    model = onnx_model(Reduced().eval(), (x,), opset)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert model.ir_version == {17: 8, 18: 8, 19: 9, 20: 9}[opset]
    session = open_session(model.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, Reduced()(x).numpy(), rtol=1e-5)


def test_what_an_opset_lacks_is_refused() -> None:
    node = onnx.helper.make_node("Mish", ["x"], ["y"])
    value = (onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", *value)],
        [onnx.helper.make_tensor_value_info("y", *value)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    with pytest.raises(onnx.checker.ValidationError, match="Mish"):
        in_opset(model, 17)
