import json
from typing import Any

import numpy as np
import pytest

from embeddings_cache.images.rle import check_rle, decode_rle, encode_rle


def blobs(height: int, width: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(height, width))
    return np.cumsum(np.cumsum(noise, axis=0), axis=1) > 0


@pytest.mark.parametrize("size", [(40, 60), (1, 1), (3, 700), (300, 301)])
def test_masks_survive_rle(size: tuple[int, int]) -> None:
    for seed in range(20):
        mask = blobs(*size, seed)
        assert np.array_equal(decode_rle(json.loads(json.dumps(encode_rle(mask)))), mask)


def test_uncompressed_rle_is_read_too() -> None:
    mask = np.zeros((3, 4), bool)
    mask[1:, 1] = True
    # Column-major runs: 4 outside, 2 inside, 6 outside.
    assert np.array_equal(decode_rle({"size": [3, 4], "counts": [4, 2, 6]}), mask)


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ("02", "2 pixels for 4×4"),
        ("", "0 pixels for 4×4"),
        ([1, 2], "3 pixels for 4×4"),
        ([3.5, 12.5], "no whole numbers"),
        ([True, 15], "no whole numbers"),
        ([-3, 19], "negative runs"),
        ([8, 9], "17 pixels for 4×4"),
        ("P", "cut short"),  # says that more follows
        ("0" * 3 + "\x10", "text of another kind"),
        ("oooooooooo0", "beyond 32 bits"),
        ("O0?", "negative runs"),
        (None, "NoneType for counts"),
        (7, "int for counts"),
    ],
)
def test_runs_that_do_not_cover_the_picture_never_reach_pycocotools(counts: Any, reason: str) -> None:
    """It would read memory that is not its own, and return noise that is another at every call."""
    with pytest.raises(ValueError, match=reason):
        decode_rle({"size": [4, 4], "counts": counts})


@pytest.mark.parametrize("segmentation", [None, [[1, 2, 3, 4]], "02", 5])
def test_what_is_no_rle_at_all(segmentation: Any) -> None:
    with pytest.raises(ValueError, match="no RLE"):
        decode_rle(segmentation)


@pytest.mark.parametrize("size", [None, [4], [4, 4, 4], [4, -4], [0, 4], [4.0, 4], ["4", "4"], [2**20, 2**20]])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ValueError, match="RLE of"):
        check_rle({"size": size, "counts": [16]})


def test_text_that_was_changed_is_refused_or_covers_the_picture() -> None:
    """Whatever a byte is changed to: what passes is a mask of that size."""
    mask = blobs(30, 40, 0)
    text, chance = encode_rle(mask)["counts"], np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        place = chance.integers(len(text))
        changed = text[:place] + chr(chance.integers(32, 127)) + text[place + 1 :]
        try:
            assert decode_rle({"size": [30, 40], "counts": changed}).shape == (30, 40)
        except ValueError:
            refused += 1
    assert refused > 200
