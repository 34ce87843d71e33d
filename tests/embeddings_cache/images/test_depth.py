"""Against the Euclidean distance transform of all pixels."""

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter

from embeddings_cache.images.depth import deepest_pixel


def deepest_of_all(mask: np.ndarray) -> tuple[int, int]:
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return tuple(int(place) for place in np.unravel_index(depth.argmax(), depth.shape))  # type: ignore[return-value]


def blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return gaussian_filter(rng.random((height, width)), rng.uniform(1, 9)) > 0.5


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.random((height, width)) < rng.random()


def everything(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return np.ones((height, width), dtype=bool)


def outline(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Where two masks of an object differ: thin, and around much that is not of it."""
    object_ = blobs(rng, height, width)
    return object_ ^ np.roll(object_, rng.integers(1, 4), axis=rng.integers(2))


def stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Many pixels are the deepest: the first is asked for."""
    along = np.arange(width) % rng.integers(2, 40) > rng.integers(0, 3)
    return np.tile(along, (height, 1)) if rng.random() < 0.5 else np.tile(along[:height, None], (1, width))


@pytest.mark.parametrize("kind", [blobs, noise, everything, outline, stripes])
def test_it_is_the_first_of_the_deepest(kind) -> None:
    rng = np.random.default_rng(0)
    compared = 0
    while compared < 60:
        mask = kind(rng, *rng.integers(1, 400, 2))  # also of fewer pixels than it is worth for
        if mask.any():
            assert deepest_pixel(mask) == deepest_of_all(mask), mask.shape
            compared += 1


def test_of_a_photographs_size() -> None:
    rng = np.random.default_rng(1)
    for kind in (blobs, outline):
        mask = kind(rng, 700, 1100)
        assert deepest_pixel(mask) == deepest_of_all(mask)


def test_one_pixel_and_rows() -> None:
    assert deepest_pixel(np.ones((1, 1), dtype=bool)) == (0, 0)
    assert deepest_pixel(np.ones((1, 40000), dtype=bool)) == (0, 0)
    assert deepest_pixel(np.ones((40000, 3), dtype=bool)) == (1, 1)
