"""Weights in fewer bits, packed by hand."""

from pathlib import Path

import numpy as np

from mil import MEAN, Case, X, check_case, ct, each, mb, operations_of, types

CASES = [
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


@each(CASES)
def test_an_operation(case: Case, tmp_path: Path) -> None:
    check_case(case, tmp_path)


def test_every_operation_is_tested() -> None:
    assert {case.operation for case in CASES} == operations_of("compressed")
