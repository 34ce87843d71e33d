"""Convolutions and pooling."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.export.coreml.operations.registry import ints, operation

PAD_TYPES = ("custom", "valid", "same", "same_lower")


def _pads(pad_type: str, pad: Tensor, size: Sequence[int], kernel: Sequence[int], strides: list[int]) -> list[int]:
    """Cells before and after each spatial dimension. `kernel`: with its dilation.

    same: TensorFlow's SAME, the odd cell after; same_lower: before.
    """
    if pad_type == "custom":
        return ints(pad)
    if pad_type == "valid":
        return [0] * (2 * len(size))
    pads = []
    for cells, width, stride in zip(size, kernel, strides, strict=True):
        total = max(0, (math.ceil(cells / stride) - 1) * stride + width - cells)
        before = (total + (pad_type == "same_lower")) // 2
        pads += [before, total - before]
    return pads


def pad_spatial(x: Tensor, pads: list[int], value: float = 0.0) -> Tensor:
    """torch's order is the last dimension first."""
    return F.pad(x, [p for i in range(len(pads) - 2, -1, -2) for p in pads[i : i + 2]], value=value)


def _dilated(weight: Tensor, dilations: list[int]) -> list[int]:
    return [(width - 1) * dilation + 1 for width, dilation in zip(weight.shape[2:], dilations, strict=True)]


@operation("conv", pad_type=PAD_TYPES)
def conv(
    x: Tensor,
    weight: Tensor,
    strides: Tensor,
    pad_type: str,
    pad: Tensor,
    dilations: Tensor,
    groups: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    run = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    steps, dilation = ints(strides), ints(dilations)
    pads = _pads(pad_type, pad, x.shape[2:], _dilated(weight, dilation), steps)
    if pads[::2] != pads[1::2]:
        x, pads = pad_spatial(x, pads), [0] * len(pads)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)  # two thirds of the time, on a CPU
    return run(x, weight, bias, steps, pads[::2], dilation, int(groups))


@operation("conv_transpose", pad_type=PAD_TYPES[:3])
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    strides: Tensor,
    pad_type: str,
    pad: Tensor,
    dilations: Tensor,
    groups: Tensor,
    bias: Tensor | None = None,
    output_shape: Tensor | None = None,
) -> Tensor:
    run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.dim() - 3]
    steps, dilation = ints(strides), ints(dilations)
    whole = run(x, weight, None, steps, 0, 0, int(groups), dilation)
    size = whole.shape[2:]
    if pad_type == "same":
        wanted = [cells * step for cells, step in zip(x.shape[2:], steps, strict=True)]
        pads = _pads("same", pad, wanted, _dilated(weight, dilation), steps)
    else:
        pads = ints(pad) if pad_type == "custom" else [0] * (2 * len(size))
        wanted = [cells - pads[2 * i] - pads[2 * i + 1] for i, cells in enumerate(size)]
    if output_shape is not None:
        wanted = ints(output_shape)[2:]
    for i, (cells, length) in enumerate(zip(size, wanted, strict=True)):
        missing = max(0, pads[2 * i] + length - cells)
        whole = torch.cat([whole, whole.new_zeros(*whole.shape[: i + 2], missing, *whole.shape[i + 3 :])], i + 2)
        whole = whole.narrow(i + 2, pads[2 * i], length)
    return whole if bias is None else whole + bias.view(-1, *[1] * len(size))


@operation("avg_pool", pad_type=PAD_TYPES, ceil_mode=(False,))
def avg_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor,
    pad_type: str,
    pad: Tensor,
    ceil_mode: Tensor,
    exclude_padding_from_average: Tensor,
) -> Tensor:
    run = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3]
    kernel, steps = ints(kernel_sizes), ints(strides)
    pads = _pads(pad_type, pad, x.shape[2:], kernel, steps)
    mean = run(pad_spatial(x, pads), kernel, steps)
    if not exclude_padding_from_average:
        return mean
    return mean / run(pad_spatial(torch.ones_like(x), pads), kernel, steps)


@operation("max_pool", pad_type=PAD_TYPES, ceil_mode=(False,))
def max_pool(x: Tensor, kernel_sizes: Tensor, strides: Tensor, pad_type: str, pad: Tensor, ceil_mode: Tensor) -> Tensor:
    run = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3]
    kernel, steps = ints(kernel_sizes), ints(strides)
    return run(pad_spatial(x, _pads(pad_type, pad, x.shape[2:], kernel, steps), -math.inf), kernel, steps)
