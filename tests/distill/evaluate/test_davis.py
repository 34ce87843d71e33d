from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

from distill.evaluate.davis import (
    VOID,
    boundary_map,
    compare_object,
    contour_accuracy,
    read_labels,
    region_similarity,
    write_labels,
)
from students import InputError


def rectangle(size: tuple[int, int], top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def test_region_similarity() -> None:
    square = rectangle((20, 30), 4, 8, 4, 8)
    nothing = np.zeros_like(square)
    assert region_similarity(square, square) == 1
    assert region_similarity(square, rectangle((20, 30), 4, 8, 6, 10)) == pytest.approx(8 / 24)
    assert region_similarity(nothing, square) == region_similarity(square, nothing) == 0
    assert region_similarity(nothing, nothing) == 1


def test_boundary_is_towards_the_origin() -> None:
    dot = rectangle((5, 6), 2, 3, 2, 3)
    assert np.argwhere(boundary_map(dot)).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    corner = rectangle((5, 6), 4, 5, 5, 6)
    assert np.argwhere(boundary_map(corner)).tolist() == [[3, 4], [3, 5], [4, 4]]
    assert not boundary_map(np.ones((5, 6), dtype=bool)).any()


def test_contours_match_within_the_tolerance() -> None:
    size = (100, 100)  # the diagonal's 0.008 is 1.13 px, rounded up 2
    half = rectangle(size, 0, 100, 0, 50)
    assert contour_accuracy(half, half) == 1
    assert contour_accuracy(half, rectangle(size, 0, 100, 0, 52)) == 1
    assert contour_accuracy(half, rectangle(size, 0, 100, 0, 53)) == 0
    # The 100 px of the line are matched, the 40 around a square of 10×10 are not: P = 100/140, R = 1.
    more = half | rectangle(size, 20, 30, 80, 90)
    assert contour_accuracy(half, more) == pytest.approx(5 / 6)
    assert contour_accuracy(more, half) == pytest.approx(5 / 6)


def test_contours_that_are_not_there() -> None:
    square = rectangle((40, 40), 10, 20, 10, 20)
    nothing, all_of_it = np.zeros_like(square), np.ones_like(square)
    assert contour_accuracy(nothing, nothing) == 1
    assert contour_accuracy(square, nothing) == contour_accuracy(nothing, square) == 0
    assert contour_accuracy(all_of_it, nothing) == 1  # neither has a boundary


def restated(truth: np.ndarray, mask: np.ndarray) -> float:
    """F by distances between all pixels of both boundaries."""
    height, width = truth.shape

    def boundary(region: np.ndarray) -> list[tuple[int, int]]:
        return [
            (y, x)
            for y in range(height)
            for x in range(width)
            if any(
                region[y + down, x + right] != region[y, x]
                for down, right in ((0, 1), (1, 0), (1, 1))
                if y + down < height and x + right < width
            )
        ]

    distances = cdist(boundary(mask), boundary(truth))
    reach = np.ceil(0.008 * np.sqrt(height**2 + width**2))
    precision, recall = ((distances.min(axis=axis) <= reach).mean() for axis in (1, 0))
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("size", [(48, 64), (150, 210), (240, 90)])
def test_contours_agree_with_distances(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(size[0])
    noise = gaussian_filter(rng.standard_normal((3, *size)), (0, 5, 5))
    noise /= noise.std()
    truth, similar, other = noise[0] > 0.5, noise[0] + 0.3 * noise[1] > 0.5, noise[2] > 0
    scores = [contour_accuracy(truth, mask) for mask in (similar, other)]
    assert scores == pytest.approx([restated(truth, mask) for mask in (similar, other)])
    assert 1 > scores[0] > scores[1] > 0


def test_void_is_left_out_of_both() -> None:
    truth = np.zeros((100, 100), dtype=np.uint8)
    truth[20:40, 20:40] = 2
    truth[20:40, 40:60] = VOID
    labels = np.zeros_like(truth)
    labels[20:40, 20:60] = 2
    assert compare_object(truth, labels, 2) == (1, 1)
    truth[truth == VOID] = 0
    region, contour = compare_object(truth, labels, 2)
    assert region == 0.5
    assert contour < 1


def test_label_maps_are_palette_pictures(tmp_path: Path) -> None:
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_labels(tmp_path / "sequence" / "00000.png", labels)
    with Image.open(tmp_path / "sequence" / "00000.png") as image:
        assert image.mode == "P"
        # PASCAL VOC's first colours, which DAVIS's annotations show, and its last.
        colours = np.asarray(image.convert("RGB")).reshape(256, 3)[[0, 1, 2, 3, 8, 255]].tolist()
    assert colours == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [64, 0, 0], [224, 224, 192]]
    assert np.array_equal(read_labels(tmp_path / "sequence" / "00000.png"), labels)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_label_maps_of_few_bits_are_read_as_stored(tmp_path: Path, bits: int) -> None:
    labels = np.array([[0, 1], [1, 0]], dtype=np.uint8)
    image = Image.fromarray(labels)
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(tmp_path / "few.png", bits=bits)
    assert np.array_equal(read_labels(tmp_path / "few.png"), labels)


def test_other_pictures_are_no_label_maps(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    with pytest.raises(InputError, match=r"map\.png: no such file"):
        read_labels(path)
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(path)
    with pytest.raises(InputError, match=r"map\.png is no label map"):
        read_labels(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"map\.png cannot be read"):
        read_labels(path)
