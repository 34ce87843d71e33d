"""Every package here is made by coremltools, saved, and read back; what is expected is worked out beside it."""

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything.utils.onnx import SamOnnxModel
from torch import nn

from distill.export.coreml_check import CoremlRuntime, MilProgram, runtime_available
from distill.export.encoder import RgbEncoder
from distill.export.mil_ops import BINARY, OPERATIONS, UNARY
from embeddings_cache.teacher import load_teacher
from students import InputError, StudentEncoder, create_student

ct = pytest.importorskip("coremltools")
mb = ct.converters.mil.Builder
types = ct.converters.mil.mil.types
Program, Function = ct.converters.mil.mil.Program, ct.converters.mil.mil.Function
sliding_window_view = np.lib.stride_tricks.sliding_window_view

Arrays = dict[str, np.ndarray]


def save_program(
    path: Path, body: Callable[..., Any], inputs: Mapping[str, np.ndarray], half: bool = False, target: Any = None
) -> Path:
    """A package of one MIL program; no pass of coremltools may fold or replace the operations in it."""
    target = target or ct.target.iOS16
    dtypes = {"f": types.fp32, "i": types.int32}
    with Function(
        {k: mb.placeholder(shape=v.shape, dtype=dtypes[v.dtype.kind]) for k, v in inputs.items()}, target
    ) as function:
        results = body(**function.inputs)
        function.set_outputs(list(results) if isinstance(results, list | tuple) else [results])
    program = Program()
    program.add_function("main", function)
    pipeline = ct.PassPipeline.EMPTY
    if half:
        pipeline.append_pass("common::add_fp16_cast")
    convert(path, program, pass_pipeline=pipeline, minimum_deployment_target=target)
    return path


def convert(path: Path, source: Any, **options: Any) -> Any:
    options = {"minimum_deployment_target": ct.target.iOS16, **options}
    model = ct.convert(source, convert_to="mlprogram", skip_model_load=True, **options)
    model.save(str(path))
    return model


def trace(module: nn.Module, example: tuple[torch.Tensor, ...], dynamic_shapes: Any = None) -> Any:
    return torch.export.export(module.eval(), example, dynamic_shapes=dynamic_shapes).run_decompositions({})


def operations(path: Path) -> set[str]:
    function = ct.models.MLModel(str(path), skip_model_load=True).get_spec().mlProgram.functions["main"]
    return {op.type for op in function.block_specializations[function.opset].operations}


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_collect() -> Iterator[None]:
    """`ct.convert` ends with a whole garbage collection, a quarter of a second with all of torch loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# Operations, one at a time

random = np.random.default_rng(0)
X = random.normal(size=(2, 3, 5, 4)).astype(np.float32)
POSITIVE = np.abs(X) + 0.1
W = random.normal(size=(4, 3, 3, 2)).astype(np.float32)
BIAS = random.normal(size=4).astype(np.float32)
GAMMA, BETA, MEAN = random.normal(size=(3, 3)).astype(np.float32)
VARIANCE = random.uniform(0.5, 2, 3).astype(np.float32)
INDICES = np.array([2, 0, -1], np.int32)
SIZES = np.array([6, 0, -1], np.int32)
RAMP = np.arange(2, dtype=np.float32).reshape(1, 1, 1, 2)
erf = np.vectorize(math.erf)


@dataclass
class Case:
    """A program around one operation, its inputs, and what comes out by another road."""

    operation: str
    body: Callable[..., Any]
    inputs: Arrays
    expected: Callable[..., Any]
    target: Any = None


def convolved(
    x: np.ndarray, weight: np.ndarray, strides: tuple[int, ...], dilations: tuple[int, ...] = (1, 1)
) -> np.ndarray:
    size = [(width - 1) * dilation + 1 for width, dilation in zip(weight.shape[2:], dilations, strict=True)]
    windows = sliding_window_view(x, size, axis=(2, 3))[:, :, :: strides[0], :: strides[1]]
    return np.einsum("nchwij,ocij->nohw", windows[..., :: dilations[0], :: dilations[1]], weight)


def spread(x: np.ndarray, weight: np.ndarray, strides: tuple[int, int]) -> np.ndarray:
    """The transposed convolution, whole: each cell adds its kernel."""
    (high, wide), (rows, columns) = x.shape[2:], weight.shape[2:]
    size = (high - 1) * strides[0] + rows, (wide - 1) * strides[1] + columns
    whole = np.zeros((x.shape[0], weight.shape[1], *size))
    for i in range(high):
        for j in range(wide):
            top, left = i * strides[0], j * strides[1]
            cell = np.einsum("nc,cokl->nokl", x[:, :, i, j], weight)
            whole[:, :, top : top + rows, left : left + columns] += cell
    return whole


def padded(x: np.ndarray, *sides: tuple[int, int], value: float = 0.0) -> np.ndarray:
    return np.pad(x, [(0, 0)] * (x.ndim - len(sides)) + list(sides), constant_values=value)


def channels(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, 1, 1)


def normalized(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> np.ndarray:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def soft(x: np.ndarray, axis: int) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis, keepdims=True)


def interpolated(x: np.ndarray, size: tuple[int, int], align_corners: bool) -> np.ndarray:
    return nn.functional.interpolate(torch.from_numpy(x), size, mode="bilinear", align_corners=align_corners).numpy()


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return soft(query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1]) + bias, -1) @ value


UNARY_EXPECTED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "erf": erf,
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
}
NUMPY_NAMES = {"floor_div": "floor_divide", "mul": "multiply", "sub": "subtract"}
COMPARED = {"equal", "greater", "greater_equal", "less", "less_equal", "not_equal"}


def unary_case(name: str) -> Case:
    x = POSITIVE if name == "sqrt" else np.append(X * 3, [0.5, -1.5, 2.5]).astype(np.float32)
    return Case(name, lambda x: getattr(mb, name)(x=x), {"x": x}, UNARY_EXPECTED.get(name) or getattr(np, name))


def binary_case(name: str) -> Case:
    x, y = np.round(X * 2), np.round(POSITIVE[:, :, ::-1, :1] * 3) + 1
    run = getattr(np, NUMPY_NAMES.get(name, name))
    if name.startswith("logical_"):
        as_bool = partial(mb.cast, dtype="bool")
        return Case(
            name,
            lambda x, y: mb.cast(x=getattr(mb, name)(x=as_bool(x=x), y=as_bool(x=y)), dtype="int32"),
            {"x": x.astype(np.int32) % 2, "y": y.astype(np.int32) % 2},
            lambda x, y: run(x, y).astype(np.int32),
        )
    if name in COMPARED:
        return Case(
            name,
            lambda x, y: mb.cast(x=getattr(mb, name)(x=x, y=y), dtype="int32"),
            {"x": x, "y": np.round(X[:, :, ::-1, :1] * 2)},
            lambda x, y: run(x, y).astype(np.int32),
        )
    return Case(name, lambda x, y: getattr(mb, name)(x=x, y=y), {"x": X, "y": y}, run)


CASES = [
    *(unary_case(name) for name in UNARY if name != "logical_not"),
    *(binary_case(name) for name in BINARY),
    Case(
        "logical_not",
        lambda x: mb.cast(x=mb.logical_not(x=mb.cast(x=x, dtype="bool")), dtype="int32"),
        {"x": np.array([0, 1, -2], np.int32)},
        lambda x: np.array([1, 0, 0], np.int32),
    ),
    Case(
        "add",
        lambda x, y: mb.add(x=x, y=y),
        {"x": INDICES, "y": np.array([5], np.int32)},
        lambda x, y: np.array([7, 5, 4], np.int32),
    ),
    Case("pow", lambda x: mb.pow(x=x, y=2.0), {"x": X}, lambda x: x * x),
    Case("pow", lambda x, y: mb.pow(x=x, y=y), {"x": POSITIVE, "y": X}, np.power),
    Case("real_div", lambda x, y: mb.real_div(x=x, y=y), {"x": X, "y": POSITIVE[:, :1]}, np.divide),
    Case(
        "real_div",
        lambda x, y: mb.real_div(x=x, y=y),
        {"x": np.array([6, -8], np.int32), "y": np.array([3, 4], np.int32)},
        lambda x, y: np.array([2, -2], np.int32),
    ),
    Case("cast", lambda x: mb.cast(x=x, dtype="int32"), {"x": X * 5}, lambda x: np.trunc(x).astype(np.int32)),
    Case("cast", lambda x: mb.cast(x=x, dtype="fp32"), {"x": INDICES}, lambda x: x.astype(np.float32)),
    Case(
        "cast",
        lambda x: mb.cast(x=mb.cast(x=x, dtype="bool"), dtype="fp32"),
        {"x": np.array([0, 0.3, -2], np.float32)},
        lambda x: np.array([0, 1, 1], np.float32),
    ),
    Case("clip", lambda x: mb.clip(x=x, alpha=-0.5, beta=0.7), {"x": X}, lambda x: np.clip(x, -0.5, 0.7)),
    Case("gelu", lambda x: mb.gelu(x=x), {"x": X}, lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2)))),
    Case(
        "gelu",
        lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        {"x": X * 2},
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    Case(
        "gelu",
        lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        {"x": X},
        lambda x: x / (1 + np.exp(-1.702 * x)),
    ),
    Case("inverse", lambda x: mb.inverse(x=x, epsilon=0.2), {"x": POSITIVE}, lambda x: 1 / (x + 0.2)),
    Case("log", lambda x: mb.log(x=x, epsilon=0.2), {"x": POSITIVE}, lambda x: np.log(x + 0.2)),
    Case("rsqrt", lambda x: mb.rsqrt(x=x, epsilon=0.2), {"x": POSITIVE}, lambda x: (x + 0.2) ** -0.5),
    Case(
        "select",
        lambda x, y: mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=y),
        {"x": X, "y": X[:, :1] * 2},
        lambda x, y: np.where(x > 0, x, y),
    ),
    Case("softmax", lambda x: mb.softmax(x=x, axis=1), {"x": X}, lambda x: soft(x, 1)),
    # convolution: PAD_TYPES worked out by hand for 5 × 4 cells
    Case(
        "conv",
        lambda x: mb.conv(x=x, weight=W, bias=BIAS, pad_type="custom", pad=[2, 1, 0, 1], strides=[2, 1]),
        {"x": X},
        lambda x: convolved(padded(x, (2, 1), (0, 1)), W, (2, 1)) + channels(BIAS),
    ),
    Case(
        "conv",
        lambda x: mb.conv(x=x, weight=W, pad_type="custom", pad=[1, 1, 2, 2], dilations=[2, 1]),
        {"x": X},
        lambda x: convolved(padded(x, (1, 1), (2, 2)), W, (1, 1), (2, 1)),
    ),
    Case("conv", lambda x: mb.conv(x=x, weight=W, pad_type="valid"), {"x": X}, lambda x: convolved(x, W, (1, 1))),
    Case(
        "conv",
        lambda x: mb.conv(x=x, weight=W, pad_type="same", strides=[2, 1]),
        {"x": X},
        lambda x: convolved(padded(x, (1, 1), (0, 1)), W, (2, 1)),
    ),
    Case(
        "conv",
        lambda x: mb.conv(x=x, weight=W, pad_type="same_lower", strides=[2, 1]),
        {"x": X},
        lambda x: convolved(padded(x, (1, 1), (1, 0)), W, (2, 1)),
    ),
    Case(
        "conv",
        lambda x: mb.conv(x=x, weight=W[:3, :1], groups=3, pad_type="valid"),
        {"x": X},
        lambda x: np.concatenate([convolved(x[:, i : i + 1], W[i : i + 1, :1], (1, 1)) for i in range(3)], 1),
    ),
    Case(
        "conv",
        lambda x: mb.conv(x=x, weight=W[..., 0], pad_type="valid"),
        {"x": X[..., 0]},
        lambda x: convolved(x[..., None], W[..., :1], (1, 1))[..., 0],
    ),
    Case(
        "conv_transpose",
        lambda x: mb.conv_transpose(x=x, weight=W[:3], strides=[2, 2], pad_type="valid", bias=BIAS[:3]),
        {"x": X},
        lambda x: spread(x, W[:3], (2, 2)) + channels(BIAS[:3]),
    ),
    Case(
        "conv_transpose",
        lambda x: mb.conv_transpose(x=x, weight=W[:3], strides=[2, 3], pad_type="custom", pad=[1, 0, 2, 1]),
        {"x": X},
        lambda x: spread(x, W[:3], (2, 3))[:, :, 1:, 2:-1],
    ),
    Case(
        "conv_transpose",
        lambda x: mb.conv_transpose(
            x=x, weight=W[:3], strides=[2, 2], pad_type="custom", pad=[1, 1, 0, 0], output_shape=[2, 3, 10, 10]
        ),
        {"x": X},
        lambda x: padded(spread(x, W[:3], (2, 2))[:, :, 1:], (0, 0), (0, 2)),
    ),
    Case(
        "conv_transpose",
        lambda x: mb.conv_transpose(x=x, weight=W[:3], strides=[1, 3], pad_type="same"),
        {"x": X},
        lambda x: padded(spread(x, W[:3], (1, 3))[:, :, 1:-1], (0, 0), (0, 1)),
    ),
    Case(
        "conv_transpose",
        lambda x: mb.conv_transpose(x=x, weight=W[:3, :1], groups=3, pad_type="valid"),
        {"x": X},
        lambda x: np.concatenate([spread(x[:, i : i + 1], W[i : i + 1, :1], (1, 1)) for i in range(3)], 1),
    ),
    Case(
        "avg_pool",
        lambda x: mb.avg_pool(x=x, kernel_sizes=[3, 2], strides=[2, 1], pad_type="custom", pad=[1, 0, 0, 1]),
        {"x": X},
        lambda x: sliding_window_view(padded(x, (1, 0), (0, 1)), (3, 2), (2, 3))[:, :, ::2].mean((-1, -2)),
    ),
    Case(
        "avg_pool",
        lambda x: mb.avg_pool(
            x=x, kernel_sizes=[3, 2], strides=[2, 1], pad_type="same", exclude_padding_from_average=True
        ),
        {"x": X},
        lambda x: np.nanmean(
            sliding_window_view(padded(x, (1, 1), (0, 1), value=np.nan), (3, 2), (2, 3))[:, :, ::2], (-1, -2)
        ),
    ),
    Case(
        "max_pool",
        lambda x: mb.max_pool(x=x, kernel_sizes=[3, 2], strides=[2, 1], pad_type="custom", pad=[2, 0, 0, 1]),
        {"x": X - 9},
        lambda x: sliding_window_view(padded(x, (2, 0), (0, 1), value=-99), (3, 2), (2, 3))[:, :, ::2].max((-1, -2)),
    ),
    # matrices
    Case(
        "linear",
        lambda x: mb.linear(x=x, weight=W[:, :2, :2, 0].reshape(4, 4), bias=BIAS),
        {"x": X[0]},
        lambda x: x @ W[:, :2, :2, 0].reshape(4, 4).T + BIAS,
    ),
    Case("matmul", lambda x, y: mb.matmul(x=x, y=y), {"x": X, "y": X[0, 0].T.copy()}, lambda x, y: x @ y),
    Case("matmul", lambda x: mb.matmul(x=x, y=x, transpose_y=True), {"x": X}, lambda x: x @ x.swapaxes(2, 3)),
    Case(
        "matmul",
        lambda x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
        {"x": X, "y": X[:, :, :, ::-1].swapaxes(2, 3)[:, :, :3].repeat(2, 2)[:, :, :5].copy()},
        lambda x, y: x.swapaxes(2, 3) @ y.swapaxes(2, 3),
    ),
    Case(
        "einsum",
        lambda x, y: mb.einsum(values=[x, y], equation="nchw,nwhu->nchu"),
        {"x": X, "y": X[:1, :, :, :2].repeat(2, 1)[:, :4].copy()},
        lambda x, y: np.stack([x[:, :, h] @ y[:, :, h] for h in range(5)], 2),
    ),
    Case(
        "scaled_dot_product_attention",
        lambda x, y: mb.scaled_dot_product_attention(query=x, key=y, value=mb.mul(x=y, y=2.0)),
        {"x": X, "y": X[:, :, ::2] + 1},
        lambda x, y: attention(x, y, 2 * y, 0 * x[..., :3]),
        ct.target.iOS18,
    ),
    Case(
        "scaled_dot_product_attention",
        lambda x, y: mb.scaled_dot_product_attention(query=x, key=x, value=x, attn_mask=mb.greater(x=y, y=-0.5)),
        {"x": X, "y": X @ X.swapaxes(2, 3) + 5 * np.eye(5, dtype=np.float32)},
        lambda x, y: attention(x, x, x, np.where(y > -0.5, 0, -np.inf)),
        ct.target.iOS18,
    ),
    # normalisation
    Case(
        "layer_norm",
        lambda x: mb.layer_norm(x=x, axes=[1, -1], gamma=W[0, :, :2, :].reshape(3, 4), epsilon=0.1),
        {"x": X},
        lambda x: normalized(x, (1, 3), 0.1) * W[0, :, :2, :].reshape(3, 1, 4),
    ),
    Case(
        "layer_norm",
        lambda x: mb.layer_norm(x=x, axes=[-1], gamma=BIAS, beta=BIAS * 2),
        {"x": X},
        lambda x: normalized(x, (3,), 1e-5) * BIAS + BIAS * 2,
    ),
    Case(
        "instance_norm",
        lambda x: mb.instance_norm(x=x, gamma=GAMMA, beta=BETA, epsilon=0.1),
        {"x": X},
        lambda x: normalized(x, (2, 3), 0.1) * channels(GAMMA) + channels(BETA),
    ),
    Case(
        "batch_norm",
        lambda x: mb.batch_norm(x=x, mean=MEAN, variance=VARIANCE, gamma=GAMMA, beta=BETA, epsilon=0.1),
        {"x": X},
        lambda x: (x - channels(MEAN)) / np.sqrt(channels(VARIANCE) + 0.1) * channels(GAMMA) + channels(BETA),
    ),
    # reductions
    Case("reduce_mean", lambda x: mb.reduce_mean(x=x, axes=[-1, 1]), {"x": X}, lambda x: x.mean((1, 3))),
    Case(
        "reduce_sum",
        lambda x: mb.reduce_sum(x=x, axes=[2], keep_dims=True),
        {"x": X},
        lambda x: x.sum(2, keepdims=True),
    ),
    Case("reduce_max", lambda x: mb.reduce_max(x=x, axes=[0, 2]), {"x": X}, lambda x: x.max((0, 2))),
    Case("reduce_min", lambda x: mb.reduce_min(x=x, axes=[0, 2]), {"x": X}, lambda x: x.min((0, 2))),
    Case(
        "reduce_max",
        lambda x: mb.expand_dims(x=mb.reduce_max(x=x), axes=[0]),
        {"x": X},
        lambda x: x.max(keepdims=True)[0, 0, 0],
    ),
    Case(
        "reduce_argmax",
        lambda x: mb.reduce_argmax(x=x, axis=2, keep_dims=True),
        {"x": X},
        lambda x: x.argmax(2, keepdims=True).astype(np.int32),
    ),
    Case("cumsum", lambda x: mb.cumsum(x=x, axis=1), {"x": X}, lambda x: x.cumsum(1)),
    # shape and place
    Case(
        "gather",
        lambda x: mb.expand_dims(x=mb.gather(x=x, indices=1, axis=0), axes=[0]),
        {"x": INDICES},
        lambda x: x[1:2],
    ),
    Case("shape", lambda x: mb.shape(x=mb.add(x=x, y=1.0)), {"x": X}, lambda x: np.array([2, 3, 5, 4], np.int32)),
    Case("reshape", lambda x: mb.reshape(x=x, shape=[2, -1, 10]), {"x": X}, lambda x: x.reshape(2, 6, 10)),
    Case("reshape", lambda x, y: mb.reshape(x=x, shape=y), {"x": X[0], "y": SIZES}, lambda x, y: x.reshape(6, 5, 2)),
    Case("transpose", lambda x: mb.transpose(x=x, perm=[2, 0, -1, 1]), {"x": X}, lambda x: x.transpose(2, 0, 3, 1)),
    Case("expand_dims", lambda x: mb.expand_dims(x=x, axes=[-1, 1]), {"x": X[0]}, lambda x: x[:, None, ..., None]),
    Case("squeeze", lambda x: mb.squeeze(x=x, axes=[-1, 0]), {"x": X[:1, ..., :1]}, lambda x: x[0, ..., 0]),
    Case("squeeze", lambda x: mb.squeeze(x=x), {"x": X[:1, :1]}, lambda x: x[0, 0]),
    Case(
        "concat",
        lambda x, y: mb.concat(values=[x, y, x], axis=-2),
        {"x": X, "y": X[:, :, :2] * 2},
        lambda x, y: np.concatenate([x, y, x], 2),
    ),
    Case("stack", lambda x, y: mb.stack(values=[x, y], axis=1), {"x": X, "y": -X}, lambda x, y: np.stack([x, y], 1)),
    Case(
        "split",
        lambda x: mb.split(x=x, split_sizes=[1, 3, 1], axis=2),
        {"x": X},
        lambda x: (x[:, :, :1], x[:, :, 1:4], x[:, :, 4:]),
    ),
    Case("split", lambda x: mb.split(x=x, num_splits=2, axis=-1), {"x": X}, lambda x: (x[..., :2], x[..., 2:])),
    Case(
        "slice_by_index",
        lambda x: mb.slice_by_index(
            x=x,
            begin=[1, 0, 4, -2],
            end=[0, 9, 0, 0],
            stride=[1, 2, -2, 1],
            end_mask=[False, False, True, False],
            squeeze_mask=[True, False, False, True],
        ),
        {"x": X},
        lambda x: x[1, ::2, ::-2, -2],
    ),
    Case(
        "slice_by_index",
        lambda x: mb.slice_by_index(x=x, begin=[9, 1, 1, 0], end=[1, 3, -1, 2], begin_mask=[True, False, False, False]),
        {"x": X},
        lambda x: x[:1, 1:3, 1:-1, :2],
    ),
    Case(
        "slice_by_size",
        lambda x: mb.slice_by_size(x=x, begin=[0, 1, -3, 0], size=[1, -1, 2, 4]),
        {"x": X},
        lambda x: x[:1, 1:, 2:4],
    ),
    Case("gather", lambda x, y: mb.gather(x=x, indices=y, axis=1), {"x": X, "y": INDICES}, lambda x, y: x[:, y]),
    Case(
        "gather",
        lambda x, y: mb.gather(x=x, indices=y, axis=-1),
        {"x": X, "y": np.array([[1, 0]], np.int32)},
        lambda x, y: x[..., [[1, 0]]],
    ),
    Case(
        "gather",
        lambda x, y: mb.gather(x=x, indices=y, axis=1),
        {"x": X, "y": np.array([2, 0], np.int32)},
        lambda x, y: x[:, y],
        ct.target.iOS17,
    ),
    Case(
        "gather_along_axis",
        lambda x, y: mb.gather_along_axis(x=x, indices=y, axis=1),
        {"x": X[0, :, :, 0], "y": np.array([[4, -2], [0, 0], [1, 3]], np.int32)},
        lambda x, y: np.take_along_axis(x, y % 5, 1),
    ),
    Case(
        "gather_nd",
        lambda x, y: mb.gather_nd(x=x, indices=y),
        {"x": X, "y": np.array([[1, 2], [0, 0]], np.int32)},
        lambda x, y: np.stack([x[1, 2], x[0, 0]]),
    ),
    Case("non_zero", lambda x: mb.non_zero(x=mb.relu(x=x)), {"x": X[0]}, lambda x: np.argwhere(x > 0).astype(np.int32)),
    Case("tile", lambda x: mb.tile(x=x, reps=[1, 2, 1, 3]), {"x": X}, lambda x: np.tile(x, [1, 2, 1, 3])),
    Case(
        "fill",
        lambda x: mb.fill(shape=x, value=2.5),
        {"x": np.array([2, 3], np.int32)},
        lambda x: np.full((2, 3), 2.5, np.float32),
    ),
    Case("fill_like", lambda x: mb.fill_like(ref_tensor=x, value=3), {"x": X}, lambda x: np.full_like(x, 3, np.int32)),
    Case(
        "range_1d",
        lambda x: mb.range_1d(start=2, end=mb.squeeze(x=x, axes=[0]), step=3),
        {"x": np.array([9], np.int32)},
        lambda x: np.array([2, 5, 8], np.int32),
    ),
    *(
        Case(
            "pad",
            partial(lambda x, mode: mb.pad(x=x, pad=[2, 1, 0, 3], mode=mode), mode=mode),
            {"x": X},
            partial(lambda x, name: np.pad(x, [(0, 0), (0, 0), (2, 1), (0, 3)], name), name=name),
        )
        for mode, name in {"constant": "constant", "reflect": "reflect", "replicate": "edge"}.items()
    ),
    Case(
        "pad",
        lambda x: mb.pad(x=x, pad=[1, 0, 0, 0, 0, 0, 0, 2], constant_val=7.0),
        {"x": X},
        lambda x: padded(x, (1, 0), (0, 0), (0, 0), (0, 2), value=7),
    ),
    Case(
        "pixel_shuffle",
        lambda x: mb.pixel_shuffle(x=x, upscale_factor=2),
        {"x": X.reshape(1, 8, 3, 5)},
        lambda x: x.reshape(1, 2, 2, 2, 3, 5).transpose(0, 1, 4, 2, 5, 3).reshape(1, 2, 6, 10),
    ),
    # resizing: the grid points are those that the description of resize_bilinear lists for 0, 1
    *(
        Case(
            "resize_bilinear",
            partial(
                lambda x, mode, cells: mb.resize_bilinear(
                    x=x, target_size_height=1, target_size_width=cells, sampling_mode=mode
                ),
                mode=mode,
                cells=len(points),
            ),
            {"x": RAMP},
            partial(lambda x, points: np.array(points).reshape(1, 1, 1, -1), points=points),
        )
        for mode, points in [
            ("STRICT_ALIGN_CORNERS", [0, 0.25, 0.5, 0.75, 1]),
            ("STRICT_ALIGN_CORNERS", [0]),
            ("ALIGN_CORNERS", [0, 0.2, 0.4, 0.6, 0.8, 1]),
            ("ALIGN_CORNERS", [0.5]),
            ("DEFAULT", [0, 0.4, 0.8, 1, 1]),
            ("DEFAULT", [0, 1 / 3, 2 / 3, 1, 1, 1]),
            ("OFFSET_CORNERS", [0.1, 0.3, 0.5, 0.7, 0.9]),
            ("UNALIGN_CORNERS", [0, 0.1, 0.5, 0.9, 1]),
            ("UNALIGN_CORNERS", [0, 0, 1 / 3, 2 / 3, 1, 1]),
        ]
    ),
    Case(
        "resize_bilinear",
        lambda x: mb.resize_bilinear(x=x, target_size_height=3, target_size_width=9, sampling_mode="UNALIGN_CORNERS"),
        {"x": X},
        lambda x: interpolated(x, (3, 9), False),
    ),
    Case(
        "upsample_bilinear",
        lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2.5, scale_factor_width=4.0, align_corners=False),
        {"x": X},
        lambda x: interpolated(x, (12, 16), False),
    ),
    Case(
        "upsample_bilinear",
        lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3),
        {"x": X},
        lambda x: interpolated(x, (10, 12), True),
    ),
    Case(
        "upsample_nearest_neighbor",
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2.0, scale_factor_width=3.0),
        {"x": X},
        lambda x: x.repeat(2, 2).repeat(3, 3),
    ),
    # compressed weights
    Case(
        "constexpr_affine_dequantize",
        lambda x: mb.add(
            x=x,
            y=mb.constexpr_affine_dequantize(
                quantized_data=np.array([[0, 10, 255], [7, 8, 9]], np.uint8),
                zero_point=np.array([10, 0], np.uint8),
                scale=np.array([0.5, 2], np.float32),
                axis=0,
            ),
        ),
        {"x": X[0, 0, :2, :3]},
        lambda x: np.add(x, [[-5, 0, 122.5], [14, 16, 18]]),
    ),
    Case(
        "constexpr_lut_to_dense",
        lambda x: mb.add(
            x=x,
            y=mb.constexpr_lut_to_dense(
                # 6 bits: 1, 63, 2, 32, 5 from the least significant bit of the first byte on
                indices=np.array([0b11000001, 0b00101111, 0b10000000, 0b00000101], np.uint8),
                lut=np.arange(64, dtype=np.float32) / 2,
                shape=np.array([5], np.uint32),
            ),
        ),
        {"x": X[0, 0, :, 0].copy()},
        lambda x: np.add(x, [0.5, 31.5, 1, 16, 2.5]),
    ),
    Case(
        "constexpr_sparse_to_dense",
        lambda x: mb.add(
            x=x,
            y=mb.constexpr_sparse_to_dense(
                nonzero_data=np.array([3, -2, 5], np.float32),
                mask=np.array([0b10000001, 0b1], np.uint8),
                shape=np.array([3, 3], np.uint32),
            ),
        ),
        {"x": X[0, 0, :3, :3]},
        lambda x: np.add(x, [[3, 0, 0], [0, 0, 0], [0, -2, 5]]),
    ),
    Case(
        "constexpr_cast",
        lambda x: mb.add(x=x, y=mb.constexpr_cast(source_val=np.full(3, 0.1, np.float16), output_dtype="fp32")),
        {"x": MEAN},
        lambda x: x + np.float32(np.float16(0.1)),
    ),
    Case(
        "constexpr_blockwise_shift_scale",
        lambda x: mb.add(
            x=x,
            y=mb.constexpr_blockwise_shift_scale(
                data=np.array([[1, -8, 7, 0], [2, 3, 4, 5]]).astype(types.np_int4_dtype),
                scale=np.array([[0.5, 2]], np.float32),
                offset=np.array([[1, -1]]).astype(types.np_int4_dtype),
            ),
        ),
        {"x": X[0, 0, :2]},
        lambda x: np.add(x, [[0, -4.5, 16, 2], [0.5, 1, 10, 12]]),
        ct.target.iOS18,
    ),
    Case(
        # the two examples of its description
        "constexpr_lut_to_dense",
        lambda x: mb.add(
            x=x,
            y=mb.constexpr_lut_to_dense(
                indices=np.array([2, 3, 3, 0, 1, 0, 3, 0, 2, 1, 0, 3]).reshape(6, 2).astype(types.np_uint2_dtype),
                lut=np.array([1, 5, 9, 13, 2, 10, 18, 26], np.float32).reshape(2, 1, 4, 1),
            ),
        ),
        {"x": X[:, 0, :3, :2].reshape(6, 2)},
        lambda x: np.add(x, [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]]),
        ct.target.iOS18,
    ),
    Case(
        "constexpr_lut_to_dense",
        lambda x: mb.add(
            x=x,
            y=mb.constexpr_lut_to_dense(
                indices=np.array([[[0, 0], [1, 0]], [[1, 1], [0, 0]]]).astype(types.np_uint1_dtype),
                lut=np.array([1, 2, 3, 11, 12, 13], np.float32).reshape(1, 1, 1, 2, 3),
                vector_axis=1,
            ),
        ),
        {"x": X[:, 0, :, :2].repeat(2, 1)[:, :6].copy()},
        lambda x: np.add(
            x,
            [
                [[1, 1], [2, 2], [3, 3], [11, 1], [12, 2], [13, 3]],
                [[11, 11], [12, 12], [13, 13], [1, 1], [2, 2], [3, 3]],
            ],
        ),
        ct.target.iOS18,
    ),
    Case(
        "constexpr_sparse_to_dense",
        lambda x: mb.add(
            x=x,
            y=mb.constexpr_sparse_to_dense(
                nonzero_data=np.array([3, -2], np.float32),
                mask=np.array([[0, 1], [1, 0]]).astype(types.np_uint1_dtype),
            ),
        ),
        {"x": X[0, 0, :2, :2]},
        lambda x: np.add(x, [[0, 3], [-2, 0]]),
        ct.target.iOS18,
    ),
]


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{i}-{case.operation}") for i, case in enumerate(CASES)])
def test_an_operation(case: Case, tmp_path: Path) -> None:
    path = save_program(tmp_path / "m.mlpackage", case.body, case.inputs, target=case.target)
    assert case.operation in operations(path)
    expected = case.expected(*case.inputs.values())
    results = list(MilProgram(path, float16=False)(case.inputs).values())
    for result, wanted in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert result.dtype == (np.int32 if wanted.dtype == np.int32 else np.float32)
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)


def test_every_operation_is_tested() -> None:
    assert {case.operation for case in CASES} == OPERATIONS.keys()


# What the types do


def test_float16_overflows_where_the_file_says_float16(tmp_path: Path) -> None:
    inputs = {"x": np.array([300, -300, 1e-5, 2049], np.float32)}
    path = save_program(tmp_path / "m.mlpackage", lambda x: mb.mul(x=x, y=x), inputs, half=True)
    (result,) = MilProgram(path)(inputs).values()
    assert result.tolist() == [math.inf, math.inf, 0, math.inf]
    (result,) = MilProgram(path, float16=False)(inputs).values()
    np.testing.assert_allclose(result, inputs["x"] ** 2)


def test_float16_rounds_after_each_operation_and_not_within_one(tmp_path: Path) -> None:
    x = np.array([2048, 0.1], np.float32)
    path = save_program(tmp_path / "m.mlpackage", lambda x: mb.sub(x=mb.add(x=x, y=1.0), y=1.0), {"x": x}, half=True)
    (result,) = MilProgram(path)({"x": x}).values()
    tenth = np.float16(np.float16(0.1) + np.float16(1)) - np.float16(1)
    assert result.tolist() == [2047, tenth]  # 2049 is no float16, and ties go to even
    ones = {"x": np.full((1, 4096), 1.001, np.float32)}
    path = save_program(tmp_path / "sum.mlpackage", lambda x: mb.reduce_sum(x=x, axes=[1]), ones, half=True)
    (result,) = MilProgram(path)(ones).values()
    assert result.tolist() == [np.float16(np.float64(np.float16(1.001)) * 4096)]


def test_a_program_in_float32_is_not_rounded(tmp_path: Path) -> None:
    path = save_program(tmp_path / "m.mlpackage", lambda x: mb.mul(x=x, y=x), {"x": X * 300})
    (result,) = MilProgram(path)({"x": X * 300}).values()
    np.testing.assert_allclose(result, (X * 300) ** 2, rtol=1e-6)


def test_values_are_dropped_after_their_last_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chain(x: Any) -> Any:
        first = x
        for _ in range(20):
            x = mb.relu(x=x)
        halves = mb.split(x=x, num_splits=2, axis=-1)
        return mb.add(x=halves[0], y=mb.reduce_sum(x=first, axes=[-1], keep_dims=True))

    program = MilProgram(save_program(tmp_path / "m.mlpackage", chain, {"x": X}))
    held, run = [], MilProgram._run

    def spy(self: MilProgram, step: Any, values: dict[int, Any]) -> None:
        run(self, step, values)
        held.append(sum(isinstance(value, torch.Tensor) and value.numel() >= X.size // 2 for value in values.values()))

    monkeypatch.setattr(MilProgram, "_run", spy)
    (result,) = program({"x": X}).values()
    np.testing.assert_allclose(result, np.maximum(X, 0)[..., :2] + X.sum(-1, keepdims=True), rtol=1e-5, atol=1e-5)
    assert max(held) == 4  # the input, what split took, and both halves


# What is refused


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda x: mb.topk(x=x, k=1)[0], "operations that are not supported: topk"),
        (lambda x: mb.local_response_norm(x=x, size=3), "not supported: local_response_norm"),
        (lambda x: mb.concat(values=[x, x], axis=1, interleave=True), "interleave=True is not supported"),
        (lambda x: mb.cumsum(x=x, axis=1, reverse=True), "reverse=True is not supported"),
        (lambda x: mb.gather(x=x, indices=[[0], [1]], axis=1, batch_dims=1), "batch_dims=1 is not supported"),
        (
            lambda x: mb.max_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid", ceil_mode=True),
            "max_pool .* ceil_mode=True is not supported",
        ),
        (
            lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=1.5, scale_factor_width=2.0),
            "scale_factor_height=1.5 is not supported",
        ),
        (
            lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2, align_corners=False, half_pixel_centers=False),
            "its input half_pixel_centers is not supported",
        ),
        (lambda x: mb.reduce_mean(x=mb.cast(x=x, dtype="int32"), axes=[1]), "reduce_mean .* of integers"),
        (lambda x: mb.pow(x=mb.cast(x=x, dtype="int32"), y=2), "pow .* of integers"),
    ],
)
def test_what_is_not_covered_is_refused_before_anything_runs(
    body: Callable[..., Any], message: str, tmp_path: Path
) -> None:
    path = save_program(tmp_path / "m.mlpackage", body, {"x": X})
    with pytest.raises(InputError, match=rf"m\.mlpackage.*{message}"):
        MilProgram(path)


def test_a_division_of_integers_that_leaves_a_rest_is_refused(tmp_path: Path) -> None:
    inputs = {"x": np.array([7], np.int32), "y": np.array([2], np.int32)}
    path = save_program(tmp_path / "m.mlpackage", lambda x, y: mb.real_div(x=x, y=y), inputs)
    with pytest.raises(InputError, match="leaves a rest"):
        MilProgram(path)(inputs)


def test_an_index_out_of_bounds_is_an_error_that_names_the_operation(tmp_path: Path) -> None:
    inputs = {"x": X, "y": np.array([3], np.int32)}
    path = save_program(tmp_path / "m.mlpackage", lambda x, y: mb.gather(x=x, indices=y, axis=1), inputs)
    with pytest.raises(RuntimeError, match=r"m\.mlpackage: gather gather_\d+: "):
        MilProgram(path)(inputs)


def test_a_path_that_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no Core ML package"):
        MilProgram(tmp_path / "gone.mlpackage")
    (tmp_path / "empty.mlpackage").mkdir()
    with pytest.raises(InputError, match=r"empty\.mlpackage cannot be read"):
        MilProgram(tmp_path / "empty.mlpackage")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input x is missing"),
        ({"x": X, "y": np.zeros(2, np.int32), "z": X}, "has no input z; its inputs: x, y"),
        ({"x": X[:1], "y": np.zeros(2, np.int32)}, r"input x has shape \(1, 3, 5, 4\), expected 2 × 3 × 5 × 4"),
        ({"x": X[0], "y": np.zeros(2, np.int32)}, "input x has shape"),
        ({"x": X, "y": np.zeros(2)}, "input y has type float64, expected integers"),
    ],
)
def test_inputs_have_to_be_those_of_the_package(inputs: Arrays, message: str, tmp_path: Path) -> None:
    example = {"x": X, "y": np.zeros(2, np.int32)}
    path = save_program(tmp_path / "m.mlpackage", lambda x, y: mb.gather(x=x, indices=y, axis=0), example)
    with pytest.raises(InputError, match=message):
        MilProgram(path)(inputs)


# Images, and shapes that are open


class Rows(nn.Module):
    """Doubles all rows but the first; (1, 3, H, W) → (1, 3, (H - 1) × W)."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return (image[:, :, 1:] * 2).flatten(2)


def save_rows(path: Path, name: str, example: tuple[int, ...], kind: Any, dynamic: Any = None) -> Path:
    exported = trace(Rows(), (torch.zeros(example),), dynamic)
    convert(path, exported, inputs=[kind], outputs=[ct.TensorType(name=name)])
    return path


def test_an_image_comes_as_rgb_from_0_to_255(tmp_path: Path) -> None:
    kind = ct.ImageType(name="image", shape=(1, 3, 6, 5), scale=0.5, bias=[1, 2, 3], color_layout=ct.colorlayout.RGB)
    program = MilProgram(save_rows(tmp_path / "m.mlpackage", "out", (1, 3, 6, 5), kind))
    pixels = random.integers(0, 256, (1, 3, 6, 5), dtype=np.uint8)
    scaled = pixels * 0.5 + channels(np.array([1, 2, 3]))
    expected = scaled[:, :, 1:].reshape(1, 3, 25) * 2
    for image in (pixels, pixels.astype(np.float32), pixels.astype(np.float64)):
        np.testing.assert_array_equal(program({"image": image})["out"], expected)
    for image in (pixels + 0.5, pixels - 256.0, pixels + 300.0, pixels * np.nan):
        with pytest.raises(InputError, match="input image is an image, whose values are whole numbers 0-255"):
            program({"image": image})
    with pytest.raises(InputError, match=r"input image has shape \(1, 3, 5, 6\), expected 1 × 3 × 6 × 5"):
        program({"image": pixels.swapaxes(2, 3)})


def test_a_float16_input_is_rounded(tmp_path: Path) -> None:
    kind = ct.TensorType(name="image", shape=(1, 3, 3, 5), dtype=np.float16)
    path = save_rows(tmp_path / "m.mlpackage", "out", (1, 3, 3, 5), kind)
    image = random.normal(size=(1, 3, 3, 5)).astype(np.float32)
    rounded = MilProgram(path)({"image": image})["out"]
    np.testing.assert_array_equal(rounded, image.astype(np.float16)[:, :, 1:].reshape(1, 3, 10) * 2)
    np.testing.assert_array_equal(
        MilProgram(path, float16=False)({"image": image})["out"], image[:, :, 1:].reshape(1, 3, 10) * 2
    )


def test_an_image_of_another_colour_order_is_refused(tmp_path: Path) -> None:
    kind = ct.ImageType(name="image", shape=(1, 3, 6, 5), color_layout=ct.colorlayout.BGR)
    path = save_rows(tmp_path / "m.mlpackage", "out", (1, 3, 6, 5), kind)
    with pytest.raises(InputError, match="input image is of type BGR image, which is not supported"):
        MilProgram(path)


def test_open_shapes_are_those_of_the_input(tmp_path: Path) -> None:
    rows = torch.export.Dim("rows", min=3, max=20)
    shape = ct.Shape((1, 3, ct.RangeDim(3, 20, default=6), 5))
    path = save_rows(
        tmp_path / "m.mlpackage", "out", (1, 3, 6, 5), ct.TensorType(name="image", shape=shape), ({2: rows},)
    )
    program = MilProgram(path)
    for height in (3, 6, 19, 20):
        image = random.normal(size=(1, 3, height, 5)).astype(np.float16).astype(np.float32)
        expected = image[:, :, 1:].reshape(1, 3, -1) * 2
        np.testing.assert_array_equal(program({"image": image})["out"], expected)
    with pytest.raises(InputError, match=r"has shape \(1, 3, 21, 5\), expected 1 × 3 × 3-20 × 5"):
        program({"image": np.zeros((1, 3, 21, 5), np.float32)})


@pytest.mark.parametrize("image", [False, True])
def test_shapes_from_a_list(image: bool, tmp_path: Path) -> None:
    rows = torch.export.Dim("rows", min=4, max=6)
    shapes = ct.EnumeratedShapes([(1, 3, 4, 5), (1, 3, 6, 5)])
    kind = (ct.ImageType if image else ct.TensorType)(name="image", shape=shapes)
    program = MilProgram(save_rows(tmp_path / "m.mlpackage", "out", (1, 3, 4, 5), kind, ({2: rows},)))
    for height in (4, 6):
        assert program({"image": np.ones((1, 3, height, 5))})["out"].shape == (1, 3, (height - 1) * 5)
    with pytest.raises(InputError, match=r"has shape \(1, 3, 5, 5\), expected 1 × 3 × 4 × 5 or 1 × 3 × 6 × 5"):
        program({"image": np.ones((1, 3, 5, 5))})


# Whole models


def small_student(name: str) -> StudentEncoder:
    """Norms as after training, for at their initial values half of the graph does nothing."""
    numbers = {"depths": [1, 1, 1, 1]} | ({"widths": [8, 16, 24, 32]} if name.startswith("repvit") else {})
    torch.manual_seed(0)
    student = create_student(name, image_size=128, embed_dim=64, **numbers)
    for layer in student.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            layer.running_mean.uniform_(-0.3, 0.3)
            layer.running_var.uniform_(0.5, 1.5)
    return student.eval()


def save_encoder(path: Path, student: StudentEncoder) -> Any:
    image = ct.ImageType(name="image", shape=(1, 3, 128, 128), color_layout=ct.colorlayout.RGB)
    exported = trace(RgbEncoder(student), (torch.zeros(1, 3, 128, 128),))
    return convert(path, exported, inputs=[image], outputs=[ct.TensorType(name="image_embeddings")])


PIXELS = random.integers(0, 256, (1, 3, 128, 128), dtype=np.uint8)


def relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("name", ["repvit_m0_9", "tiny_vit_5m"])
def test_an_encoder_computes_what_the_student_does(name: str, tmp_path: Path) -> None:
    student, path = small_student(name), tmp_path / "encoder.mlpackage"
    save_encoder(path, student)
    with torch.no_grad():
        expected = RgbEncoder(student).eval()(torch.from_numpy(PIXELS).float()).numpy()
    exact, half = (MilProgram(path, float16)({"image": PIXELS})["image_embeddings"] for float16 in (False, True))
    assert exact.shape == (1, 64, 8, 8)
    assert 0 < relative(exact, expected) < 2e-3  # the weights are float16
    assert relative(exact, expected) < relative(half, expected) < 1e-2
    np.testing.assert_array_equal(half, half.astype(np.float16))


@pytest.mark.slow
def test_compressed_weights_are_those_that_coremltools_unpacks(tmp_path: Path) -> None:
    optimize = ct.optimize.coreml
    model = save_encoder(tmp_path / "plain.mlpackage", small_student("repvit_m0_9"))
    palette = optimize.OpPalettizerConfig(mode="uniform", nbits=6, weight_threshold=0)
    linear = optimize.OpLinearQuantizerConfig(mode="linear", weight_threshold=0)
    magnitude = optimize.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=0)
    for operation, compressed in {
        "constexpr_lut_to_dense": optimize.palettize_weights(model, optimize.OptimizationConfig(palette)),
        "constexpr_affine_dequantize": optimize.linear_quantize_weights(model, optimize.OptimizationConfig(linear)),
        "constexpr_sparse_to_dense": optimize.prune_weights(model, optimize.OptimizationConfig(magnitude)),
    }.items():
        small, unpacked = tmp_path / f"{operation}.mlpackage", tmp_path / f"{operation}-unpacked.mlpackage"
        compressed.save(str(small))
        optimize.decompress_weights(compressed).save(str(unpacked))
        assert operation in operations(small)
        assert not any(name.startswith("constexpr") for name in operations(unpacked))
        for float16 in (False, True):
            result, expected, plain = (
                MilProgram(path, float16)({"image": PIXELS})["image_embeddings"]
                for path in (small, unpacked, tmp_path / "plain.mlpackage")
            )
            np.testing.assert_array_equal(result, expected)
            assert relative(result, plain) > 4e-3


class Decoder(nn.Module):
    """Points to masks, as segment-anything's own export has it, with as many points as come."""

    def __init__(self) -> None:
        super().__init__()
        self.sam = SamOnnxModel(load_teacher("toy", None, 128), return_single_mask=False)

    def forward(self, embedding: torch.Tensor, points: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoder = self.sam.model.prompt_encoder
        return self.sam.model.mask_decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=self.sam._embed_points(points, labels),
            dense_prompt_embeddings=encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, 8, 8),
        )


def test_a_decoder_with_any_number_of_points(tmp_path: Path) -> None:
    decoder, names = Decoder().eval(), ("embedding", "points", "labels")

    def example(count: int) -> tuple[torch.Tensor, ...]:
        labels = torch.arange(count)[None] % 5 - 1
        return torch.randn(1, 128, 8, 8), torch.rand(1, count, 2) * 128, labels.float()

    count = torch.export.Dim("count", min=2, max=9)
    given = ct.RangeDim(2, 9, default=3)
    shapes = [(1, 128, 8, 8), (1, given, 2), (1, given)]
    convert(
        tmp_path / "decoder.mlpackage",
        trace(decoder, example(3), ({}, {1: count}, {1: count})),
        inputs=[ct.TensorType(name=name, shape=shape) for name, shape in zip(names, shapes, strict=True)],
        outputs=[ct.TensorType(name="masks"), ct.TensorType(name="iou")],
        compute_precision=ct.precision.FLOAT32,
    )
    program = MilProgram(tmp_path / "decoder.mlpackage")
    for number in (2, 5, 9):
        values = example(number)
        result = program({name: value.numpy() for name, value in zip(names, values, strict=True)})
        with torch.no_grad():
            masks, iou = decoder(*values)
        assert relative(result["masks"], masks.numpy()) < 1e-4
        assert relative(result["iou"], iou.numpy()) < 1e-4


# The real thing


@pytest.mark.skipif(runtime_available(), reason="macOS has Core ML")
def test_core_ml_itself_is_asked_for_on_macos_only(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Core ML runs on macOS only"):
        CoremlRuntime(tmp_path / "m.mlpackage")


@pytest.mark.skipif(not runtime_available(), reason="Core ML runs on macOS only")
@pytest.mark.parametrize("name", ["repvit_m0_9", "tiny_vit_5m"])
def test_core_ml_itself_agrees(name: str, tmp_path: Path) -> None:
    path = tmp_path / "encoder.mlpackage"
    save_encoder(path, small_student(name))
    real = CoremlRuntime(path)({"image": PIXELS})["image_embeddings"]
    assert relative(MilProgram(path)({"image": PIXELS})["image_embeddings"], real) < 1e-2
