"""Weights that a file holds in fewer bits."""

import math

import numpy as np
import torch
from torch import Tensor

from distill.export.coreml.operations.registry import ints, operation


def _bits(packed: Tensor, count: int) -> np.ndarray:
    """The first `count` bits of bytes, the least significant first; uint8."""
    return np.unpackbits(packed.numpy().astype(np.uint8), count=count, bitorder="little")


@operation()
def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: Tensor) -> Tensor:
    whole = [-1 if i == int(axis) % quantized_data.dim() else 1 for i in range(quantized_data.dim())]
    return (quantized_data - zero_point.reshape(whole)) * scale.reshape(whole)


@operation()
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    def spread(block: Tensor) -> Tensor:
        for axis, cells in enumerate(data.shape):
            block = block.repeat_interleave(cells // block.shape[axis], axis)
        return block

    return (data if offset is None else data - spread(offset)) * spread(scale)


@operation()
def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: Tensor | None = None, vector_axis: Tensor | None = None
) -> Tensor:
    """iOS 16: one table, indices packed into bytes. iOS 18: a table a block of indices, and vectors in it."""
    if shape is not None:
        sizes, width = ints(shape), lut.numel().bit_length() - 1
        bits = _bits(indices, math.prod(sizes) * width).reshape(-1, width)
        return lut[torch.from_numpy(bits @ (1 << np.arange(width)))].reshape(sizes)
    tables = [
        (torch.arange(cells) // (cells // lut.shape[axis])).view(-1, *[1] * (indices.dim() - 1 - axis))
        for axis, cells in enumerate(indices.shape)
    ]
    vectors = lut[(*tables, indices.long())]
    if vector_axis is None:
        return vectors.squeeze(-1)
    axis = int(vector_axis) % indices.dim()
    return vectors.movedim(-1, axis + 1).flatten(axis, axis + 1)


@operation()
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: Tensor | None = None) -> Tensor:
    """iOS 16: the mask packed into bytes; iOS 18: in the shape of the result."""
    if shape is not None:
        sizes = ints(shape)
        mask = torch.from_numpy(_bits(mask, math.prod(sizes))).reshape(sizes)
    return nonzero_data.new_zeros(mask.shape).masked_scatter(mask.bool(), nonzero_data)


@operation("constexpr_cast", output_dtype=("fp32",))
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    return source_val
