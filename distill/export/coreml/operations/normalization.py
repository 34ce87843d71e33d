"""Layer, instance and batch norm."""

import torch
from torch import Tensor

from distill.export.coreml.operations.registry import axes_of, operation


def _normalize(x: Tensor, axes: list[int], epsilon: Tensor) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(axes, keepdim=True) + epsilon)


def _scale_and_shift(x: Tensor, gamma: Tensor | None, beta: Tensor | None, axes: list[int]) -> Tensor:
    """`gamma` and `beta` have the sizes of `x` along `axes`."""
    shape = [cells if axis in axes else 1 for axis, cells in enumerate(x.shape)]
    x = x if gamma is None else x * gamma.reshape(shape)
    return x if beta is None else x + beta.reshape(shape)


@operation()
def layer_norm(
    x: Tensor, axes: Tensor, epsilon: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    over = axes_of(x, axes)
    return _scale_and_shift(_normalize(x, over, epsilon), gamma, beta, over)


@operation()
def instance_norm(x: Tensor, epsilon: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
    return _scale_and_shift(_normalize(x, list(range(2, x.dim())), epsilon), gamma, beta, [1])


@operation()
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    epsilon: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    centred = x - mean.view(-1, *[1] * (x.dim() - 2))
    return _scale_and_shift(_scale_and_shift(centred, 1 / torch.sqrt(variance + epsilon), None, [1]), gamma, beta, [1])
