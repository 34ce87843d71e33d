"""Products of matrices, and attention."""

import math
from pathlib import Path

import numpy as np

from mil import BIAS, Case, W, X, check_case, ct, each, mb, operations_of


def soft(x: np.ndarray, axis: int) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis, keepdims=True)


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return soft(query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1]) + bias, -1) @ value


CASES = [
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
]


@each(CASES)
def test_an_operation(case: Case, tmp_path: Path) -> None:
    check_case(case, tmp_path)


def test_every_operation_is_tested() -> None:
    assert {case.operation for case in CASES} == operations_of("matrices")
