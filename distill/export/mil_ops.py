"""What Core ML's operations compute, in torch.

After the descriptions in coremltools' own reference of MIL, the language of a Core ML file
(https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html), iOS 16 and a few of iOS 18.
An operation is a function whose parameters have the names of MIL's inputs. Floats come as float32, integers as int32,
strings as str; what is left out here, an input or a value of one, is refused by the reader of the file, never ignored.
"""

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from students import InputError


@dataclass(frozen=True)
class Operation:
    """A function of torch tensors, and what of MIL's operation it covers."""

    run: Callable[..., Any]
    inputs: Collection[str]
    allowed: Mapping[str, Collection[Any]]
    """Values that a constant input may have; any, where an input is not listed."""
    floats: bool
    """Whether integers are refused, for which MIL leaves open what comes out."""


OPERATIONS: dict[str, Operation] = {}


def operation(*names: str, floats: bool = False, **allowed: Collection[Any]) -> Callable[[Any], Any]:
    """Register a function under its own name, or others."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        for name in names or (run.__name__,):
            OPERATIONS[name] = Operation(run, frozenset(inspect.signature(run).parameters), allowed, floats)
        return run

    return register


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp": torch.exp,
    "floor": torch.floor,
    "identity": torch.clone,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tanh": torch.tanh,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": torch.floor_divide,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "sub": torch.sub,
}


def _of_one(run: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x: run(x)


def _of_two(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, y: run(x, y)


for _name, _unary in UNARY.items():
    operation(_name)(_of_one(_unary))
for _name, _binary in BINARY.items():
    operation(_name)(_of_two(_binary))


def _ints(values: Tensor) -> list[int]:
    return [int(value) for value in values.reshape(-1)]


def _axes(x: Tensor, axes: Tensor | None) -> list[int]:
    return sorted(axis % x.dim() for axis in _ints(axes)) if axes is not None else list(range(x.dim()))


# Elementwise, with a parameter


@operation("cast", dtype=("int32", "fp16", "fp32", "bool"))
def cast(x: Tensor, dtype: str) -> Tensor:
    """Floats become integers towards 0. The rounding to fp16 is that of every fp16 result, done by the caller."""
    return x.to({"int32": torch.int32, "bool": torch.bool}.get(dtype, torch.float32))


@operation()
def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return x.clamp(alpha, beta)


@operation(floats=True)
def pow(x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y)


@operation()
def real_div(x: Tensor, y: Tensor) -> Tensor:
    """Of integers, an integer; which one, MIL leaves open where the division leaves a rest."""
    if x.is_floating_point():
        return x / y
    if (x % y).any():
        raise InputError("real_div of integers that leaves a rest is not supported")
    return x // y


@operation("gelu", mode=("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"))
def gelu(x: Tensor, mode: str) -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


@operation()
def inverse(x: Tensor, epsilon: Tensor) -> Tensor:
    return 1 / (x + epsilon)


@operation()
def log(x: Tensor, epsilon: Tensor) -> Tensor:
    return torch.log(x + epsilon)


@operation()
def rsqrt(x: Tensor, epsilon: Tensor) -> Tensor:
    return 1 / torch.sqrt(x + epsilon)


@operation()
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


@operation()
def softmax(x: Tensor, axis: Tensor) -> Tensor:
    return torch.softmax(x, int(axis))


# Convolution and pooling

PAD_TYPES = ("custom", "valid", "same", "same_lower")


def _pads(pad_type: str, pad: Tensor, size: Sequence[int], kernel: Sequence[int], strides: list[int]) -> list[int]:
    """Cells before and after each spatial dimension. `kernel`: with its dilation.

    same: TensorFlow's SAME, the odd cell after; same_lower: before.
    """
    if pad_type == "custom":
        return _ints(pad)
    if pad_type == "valid":
        return [0] * (2 * len(size))
    pads = []
    for cells, width, stride in zip(size, kernel, strides, strict=True):
        total = max(0, (math.ceil(cells / stride) - 1) * stride + width - cells)
        before = (total + (pad_type == "same_lower")) // 2
        pads += [before, total - before]
    return pads


def _pad_spatial(x: Tensor, pads: list[int], value: float = 0.0) -> Tensor:
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
    steps, dilation = _ints(strides), _ints(dilations)
    pads = _pads(pad_type, pad, x.shape[2:], _dilated(weight, dilation), steps)
    if pads[::2] != pads[1::2]:
        x, pads = _pad_spatial(x, pads), [0] * len(pads)
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
    steps, dilation = _ints(strides), _ints(dilations)
    whole = run(x, weight, None, steps, 0, 0, int(groups), dilation)
    size = whole.shape[2:]
    if pad_type == "same":
        wanted = [cells * step for cells, step in zip(x.shape[2:], steps, strict=True)]
        pads = _pads("same", pad, wanted, _dilated(weight, dilation), steps)
    else:
        pads = _ints(pad) if pad_type == "custom" else [0] * (2 * len(size))
        wanted = [cells - pads[2 * i] - pads[2 * i + 1] for i, cells in enumerate(size)]
    if output_shape is not None:
        wanted = _ints(output_shape)[2:]
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
    kernel, steps = _ints(kernel_sizes), _ints(strides)
    pads = _pads(pad_type, pad, x.shape[2:], kernel, steps)
    mean = run(_pad_spatial(x, pads), kernel, steps)
    if not exclude_padding_from_average:
        return mean
    return mean / run(_pad_spatial(torch.ones_like(x), pads), kernel, steps)


@operation("max_pool", pad_type=PAD_TYPES, ceil_mode=(False,))
def max_pool(x: Tensor, kernel_sizes: Tensor, strides: Tensor, pad_type: str, pad: Tensor, ceil_mode: Tensor) -> Tensor:
    run = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3]
    kernel, steps = _ints(kernel_sizes), _ints(strides)
    return run(_pad_spatial(x, _pads(pad_type, pad, x.shape[2:], kernel, steps), -math.inf), kernel, steps)


# Matrices


@operation()
def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


@operation()
def matmul(x: Tensor, y: Tensor, transpose_x: Tensor, transpose_y: Tensor) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


@operation()
def einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


@operation()
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


# Normalisation


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
    over = _axes(x, axes)
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


# Reductions


@operation(floats=True)
def reduce_mean(x: Tensor, keep_dims: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.mean(_axes(x, axes), keepdim=bool(keep_dims))


@operation()
def reduce_sum(x: Tensor, keep_dims: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.sum(_axes(x, axes), keepdim=bool(keep_dims), dtype=x.dtype)


@operation()
def reduce_max(x: Tensor, keep_dims: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.amax(_axes(x, axes), keepdim=bool(keep_dims))


@operation()
def reduce_min(x: Tensor, keep_dims: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.amin(_axes(x, axes), keepdim=bool(keep_dims))


@operation("reduce_argmax", output_dtype=("int32",))
def reduce_argmax(x: Tensor, axis: Tensor, keep_dims: Tensor, output_dtype: str = "int32") -> Tensor:
    return x.argmax(int(axis), keepdim=bool(keep_dims)).int()


@operation("cumsum", exclusive=(False,), reverse=(False,))
def cumsum(x: Tensor, axis: Tensor, exclusive: Tensor, reverse: Tensor) -> Tensor:
    return x.cumsum(int(axis), dtype=x.dtype)


# Shape and place


@operation()
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@operation()
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """0 keeps the size at its place, -1 takes the rest."""
    return x.reshape([cells or x.shape[axis] for axis, cells in enumerate(_ints(shape))])


@operation()
def transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(_ints(perm))


@operation()
def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(axis % rank for axis in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


@operation()
def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Axes of another size than 1 stay, as in torch."""
    return x.squeeze(_axes(x, axes))


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
        return x.split(_ints(split_sizes), int(axis))
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

    steps = _ints(stride) if stride is not None else [1] * x.dim()
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
    for axis, (first, length) in enumerate(zip(_ints(begin), _ints(size), strict=True)):
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
    return x.repeat(_ints(reps))


@operation()
def fill(shape: Tensor, value: Tensor) -> Tensor:
    return value.expand(_ints(shape))


@operation()
def fill_like(ref_tensor: Tensor, value: Tensor) -> Tensor:
    return value.expand(ref_tensor.shape)


@operation()
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@operation("pad", mode=("constant", "reflect", "replicate"))
def pad(x: Tensor, pad: Tensor, mode: str, constant_val: Tensor) -> Tensor:
    """Of the last dimensions, as many as `pad` has pairs."""
    pads = _ints(pad)
    if mode == "constant":
        return _pad_spatial(x, pads, constant_val.item())
    for axis, cells in enumerate(x.shape[x.dim() - len(pads) // 2 :], x.dim() - len(pads) // 2):
        both = pads[2 * (axis - x.dim()) :][:2]
        places = np.pad(np.arange(cells), both, mode="reflect" if mode == "reflect" else "edge")
        x = x.index_select(axis, torch.from_numpy(places))
    return x


@operation()
def pixel_shuffle(x: Tensor, upscale_factor: Tensor) -> Tensor:
    return F.pixel_shuffle(x, int(upscale_factor))


# Resizing: of the last two dimensions, where to look as the description of resize_bilinear has it

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


# Compressed weights


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
        sizes, width = _ints(shape), lut.numel().bit_length() - 1
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
        sizes = _ints(shape)
        mask = torch.from_numpy(_bits(mask, math.prod(sizes))).reshape(sizes)
    return nonzero_data.new_zeros(mask.shape).masked_scatter(mask.bool(), nonzero_data)


@operation("constexpr_cast", output_dtype=("fp32",))
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    return source_val
