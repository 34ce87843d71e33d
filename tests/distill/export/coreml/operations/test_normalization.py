"""Layer, instance and batch norm."""

from pathlib import Path

import numpy as np

from mil import BETA, BIAS, GAMMA, MEAN, VARIANCE, Case, W, X, channels, check_case, each, mb, normalized, operations_of

CASES = [
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
]


@each(CASES)
def test_an_operation(case: Case, tmp_path: Path) -> None:
    check_case(case, tmp_path)


def test_every_operation_is_tested() -> None:
    assert {case.operation for case in CASES} == operations_of("normalization")
