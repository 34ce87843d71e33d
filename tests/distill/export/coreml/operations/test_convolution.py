"""Padding is worked out by hand for 5 × 4 cells."""

from pathlib import Path

import numpy as np

from mil import BIAS, Case, W, X, channels, check_case, each, mb, operations_of, padded, sliding_window_view


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


CASES = [
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
]


@each(CASES)
def test_an_operation(case: Case, tmp_path: Path) -> None:
    check_case(case, tmp_path)


def test_every_operation_is_tested() -> None:
    assert {case.operation for case in CASES} == operations_of("convolution")
