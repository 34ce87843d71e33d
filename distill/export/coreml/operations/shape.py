"""Shape and place: what moves numbers without changing them."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.export.coreml.operations.convolution import pad_spatial
from distill.export.coreml.operations.registry import axes_of, ints, operation


@operation()
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@operation()
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """0 keeps the size at its place, -1 takes the rest."""
    return x.reshape([cells or x.shape[axis] for axis, cells in enumerate(ints(shape))])


@operation()
def transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(ints(perm))


@operation()
def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(axis % rank for axis in ints(axes)):
        x = x.unsqueeze(axis)
    return x


@operation()
def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Axes of another size than 1 stay, as in torch."""
    return x.squeeze(axes_of(x, axes))


@operation("concat", interleave=(False,))
def concat(values: list[Tensor], axis: Tensor, interleave: Tensor) -> Tensor:
    return torch.cat([value.reshape(1) if value.dim() == 0 else value for value in values], int(axis))


@operation()
def stack(values: list[Tensor], axis: Tensor) -> Tensor:
    return torch.stack(values, int(axis))


@operation()
def split(
    x: Tensor, axis: Tensor, num_splits: Tensor | None = None, split_sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return x.split(ints(split_sizes), int(axis))
    assert num_splits is not None  # MIL requires one of both
    return x.split(x.shape[int(axis)] // int(num_splits), int(axis))


@operation()
def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    """numpy's slicing; a mask says where `begin` or `end` is left out, or where `begin` alone is taken."""

    def masked(mask: Tensor | None, axis: int) -> bool:
        return mask is not None and bool(mask[axis])

    steps = ints(stride) if stride is not None else [1] * x.dim()
    for axis in reversed(range(x.dim())):
        first = None if masked(begin_mask, axis) else int(begin[axis])
        if masked(squeeze_mask, axis):
            x = x.select(axis, first or 0)
            continue
        last = None if masked(end_mask, axis) else int(end[axis])
        kept = range(x.shape[axis])[first : last : steps[axis]]
        x = x.index_select(axis, torch.tensor(kept, dtype=torch.int64))
    return x


@operation()
def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    """A size of -1 takes what is left."""
    for axis, (first, length) in enumerate(zip(ints(begin), ints(size), strict=True)):
        first %= x.shape[axis]
        x = x.narrow(axis, first, x.shape[axis] - first if length == -1 else length)
    return x


@operation("gather", batch_dims=(0,))
def gather(
    x: Tensor, indices: Tensor, axis: Tensor, batch_dims: Tensor, validate_indices: Tensor | None = None
) -> Tensor:
    """From iOS 17 on, where `validate_indices` is there, a negative index is out of bounds; torch raises."""
    along = int(axis) % x.dim()
    if validate_indices is None:
        indices = torch.where(indices < 0, indices + x.shape[along], indices)
    taken = x.index_select(along, indices.reshape(-1))
    return taken.reshape((*x.shape[:along], *indices.shape, *x.shape[along + 1 :]))


@operation()
def gather_along_axis(x: Tensor, indices: Tensor, axis: Tensor, validate_indices: Tensor | None = None) -> Tensor:
    if validate_indices is None:
        indices = torch.where(indices < 0, indices + x.shape[int(axis)], indices)
    return x.gather(int(axis), indices.long())


@operation("gather_nd", batch_dims=(0,))
def gather_nd(x: Tensor, indices: Tensor, batch_dims: Tensor) -> Tensor:
    return x[tuple(indices.long().unbind(-1))]


@operation()
def non_zero(x: Tensor) -> Tensor:
    return x.nonzero().int()


@operation()
def tile(x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(ints(reps))


@operation()
def fill(shape: Tensor, value: Tensor) -> Tensor:
    return value.expand(ints(shape))


@operation()
def fill_like(ref_tensor: Tensor, value: Tensor) -> Tensor:
    return value.expand(ref_tensor.shape)


@operation()
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@operation("pad", mode=("constant", "reflect", "replicate"))
def pad(x: Tensor, pad: Tensor, mode: str, constant_val: Tensor) -> Tensor:
    """Of the last dimensions, as many as `pad` has pairs."""
    pads = ints(pad)
    if mode == "constant":
        return pad_spatial(x, pads, constant_val.item())
    for axis, cells in enumerate(x.shape[x.dim() - len(pads) // 2 :], x.dim() - len(pads) // 2):
        both = pads[2 * (axis - x.dim()) :][:2]
        places = np.pad(np.arange(cells), both, mode="reflect" if mode == "reflect" else "edge")
        x = x.index_select(axis, torch.from_numpy(places))
    return x


@operation()
def pixel_shuffle(x: Tensor, upscale_factor: Tensor) -> Tensor:
    return F.pixel_shuffle(x, int(upscale_factor))
