"""Functions of one number and of two, comparisons, types, softmax."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from distill.export.coreml.operations.elementwise import BINARY, UNARY
from mil import INDICES, POSITIVE, Case, X, check_case, each, erf, mb, operations_of


def soft(x: np.ndarray, axis: int) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis, keepdims=True)


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
    Case(
        "sigmoid_hard",
        lambda x: mb.sigmoid_hard(x=x, alpha=0.4, beta=0.3),
        {"x": X * 3},
        lambda x: np.clip(0.4 * x + 0.3, 0, 1),
    ),
    Case(
        "thresholded_relu",
        lambda x: mb.thresholded_relu(x=x, alpha=-0.5),
        {"x": X},
        lambda x: np.where(x >= -0.5, x, 0),
    ),
    Case("softmax", lambda x: mb.softmax(x=x, axis=1), {"x": X}, lambda x: soft(x, 1)),
]


@each(CASES)
def test_an_operation(case: Case, tmp_path: Path) -> None:
    check_case(case, tmp_path)


def test_every_operation_is_tested() -> None:
    assert {case.operation for case in CASES} == operations_of("elementwise")
