"""The grid points are those that the description of resize_bilinear lists for 0, 1."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mil import RAMP, Case, X, check_case, each, mb, operations_of


def interpolated(x: np.ndarray, size: tuple[int, int], align_corners: bool) -> np.ndarray:
    return nn.functional.interpolate(torch.from_numpy(x), size, mode="bilinear", align_corners=align_corners).numpy()


CASES = [
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
]


@each(CASES)
def test_an_operation(case: Case, tmp_path: Path) -> None:
    check_case(case, tmp_path)


def test_every_operation_is_tested() -> None:
    assert {case.operation for case in CASES} == operations_of("resizing")
