"""Means, sums and extremes along axes."""

from pathlib import Path

import numpy as np

from mil import Case, X, check_case, each, mb, operations_of

CASES = [
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
]


@each(CASES)
def test_an_operation(case: Case, tmp_path: Path) -> None:
    check_case(case, tmp_path)


def test_every_operation_is_tested() -> None:
    assert {case.operation for case in CASES} == operations_of("reduction")
