"""What moves numbers without changing them."""

from functools import partial
from pathlib import Path

import numpy as np

from mil import INDICES, SIZES, Case, X, check_case, ct, each, mb, operations_of, padded

CASES = [
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
]


@each(CASES)
def test_an_operation(case: Case, tmp_path: Path) -> None:
    check_case(case, tmp_path)


def test_every_operation_is_tested() -> None:
    assert {case.operation for case in CASES} == operations_of("shape")
