"""Resizing of the last two dimensions; where to look is as the description of resize_bilinear has it."""

from collections.abc import Callable

import torch
from torch import Tensor

from distill.export.coreml.operations.registry import operation

SAMPLING_MODES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "STRICT_ALIGN_CORNERS": lambda i, n, m: i * ((n - 1) / max(m - 1, 1)),
    "ALIGN_CORNERS": lambda i, n, m: i * ((n - 1) / (m - 1)) if m > 1 else i + (n - 1) / 2,
    "DEFAULT": lambda i, n, m: i * (n / m),
    "OFFSET_CORNERS": lambda i, n, m: (i + 0.5) * (max(1, n - 1) / m),
    "UNALIGN_CORNERS": lambda i, n, m: (i + 0.5) * (n / m) - 0.5,
}
"""Index of a cell that comes out, cells that go in, cells that come out → where among those that go in."""


def _resize(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    for axis, cells in zip((-2, -1), size, strict=True):
        last = x.shape[axis] - 1
        places = SAMPLING_MODES[mode](torch.arange(cells, dtype=torch.float64), last + 1, cells).clamp(0, last)
        left = places.floor().long()
        share = (places - left).float().view(-1, *[1] * (-1 - axis))
        right = (left + 1).clamp(max=last)
        x = x.index_select(axis, left) * (1 - share) + x.index_select(axis, right) * share
    return x


@operation("resize_bilinear", sampling_mode=SAMPLING_MODES)
def resize_bilinear(x: Tensor, target_size_height: Tensor, target_size_width: Tensor, sampling_mode: str) -> Tensor:
    return _resize(x, (int(target_size_height), int(target_size_width)), sampling_mode)


@operation()
def upsample_bilinear(
    x: Tensor, scale_factor_height: Tensor, scale_factor_width: Tensor, align_corners: Tensor
) -> Tensor:
    size = int(x.shape[-2] * scale_factor_height), int(x.shape[-1] * scale_factor_width)
    return _resize(x, size, "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS")


WHOLE = range(1, 1025)
"""For a nearest neighbour at other factors, the description does not say which of two it is."""


@operation("upsample_nearest_neighbor", scale_factor_height=WHOLE, scale_factor_width=WHOLE)
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: Tensor, scale_factor_width: Tensor) -> Tensor:
    return x.repeat_interleave(int(scale_factor_height), -2).repeat_interleave(int(scale_factor_width), -1)
