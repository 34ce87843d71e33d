"""DAVIS's metric of masks in videos, and its label maps.

Region similarity J and contour accuracy F are those of Perazzi et al. (CVPR 2016, section 4) as
github.com/davisvideochallenge/davis2017-evaluation counts them; objects are averaged as in Pont-Tuset et al.
(arXiv:1704.00675, section 3).
"""

import math
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from embeddings_cache.images import reason_of
from embeddings_cache.system import whole_file
from students import InputError

BACKGROUND, VOID = 0, 255
"""In label maps: no object, and pixels of which nobody says whose they are."""

TOLERANCE = 0.008
"""Of the picture's diagonal: so far apart, rounded up to whole pixels, two boundaries are still the same."""


def compare_object(truth: np.ndarray, labels: np.ndarray, number: int) -> tuple[float, float]:
    """J and F of one object in one frame, void pixels left out of both masks.

    So does the official metric; but the official reader of annotations makes void background before.

    Args:
        truth: annotated label map, uint8 (H, W).
        labels: predicted label map, likewise.
        number: of the object.
    """
    drawn, found = truth == number, (labels == number) & (truth != VOID)
    return region_similarity(drawn, found), contour_accuracy(drawn, found)


def region_similarity(truth: np.ndarray, mask: np.ndarray) -> float:
    """J, the IoU of two boolean masks (H, W); 1 where both are empty."""
    union = np.count_nonzero(truth | mask)
    return float(np.count_nonzero(truth & mask) / union) if union else 1.0


def contour_accuracy(truth: np.ndarray, mask: np.ndarray) -> float:
    """F, the harmonic mean of precision and recall of the boundary of a boolean mask (H, W).

    A pixel of one boundary is matched where the other, dilated by a disk, covers it: several may match the same one.
    Where both boundaries are empty F is 1, where one is 0. A mask of the whole picture has none.
    """
    drawn, found = boundary_map(truth), boundary_map(mask)
    if not (drawn.any() and found.any()):
        return float(drawn.any() == found.any())
    radius = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.uint8)
    precision = cv2.dilate(drawn.astype(np.uint8), disk)[found].mean()
    recall = cv2.dilate(found.astype(np.uint8), disk)[drawn].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """Pixels of a boolean mask (H, W) that differ from their neighbour to the east, south or southeast.

    The boundary is half a pixel towards the origin of where it is (`seg2bmap` of BSDS). The picture's edge is none.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def read_labels(path: Path) -> np.ndarray:
    """A label map, uint8 (H, W): of a palette's or a grey PNG the values as they are stored.

    Raises:
        InputError: there is no such file, it cannot be read, or is a picture of colours.
    """
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # Pillow lets many kinds through
        raise InputError(f"{path} cannot be read: {reason_of(error)}") from error
    if mode not in ("P", "L"):
        raise InputError(f"{path} is no label map: it has mode {mode}, not a palette")
    return values


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Keep a label map, uint8 (H, W), as DAVIS takes it: a PNG with a palette."""
    image = Image.fromarray(labels)
    image.putpalette(palette().tobytes())
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG")


def palette() -> np.ndarray:
    """Colours of the numbers in DAVIS and PASCAL VOC, uint8 (256, 3).

    The bits of a number go to red, green and blue in turn, the first three of them to the highest bits.
    """
    turns = np.arange(3)
    bits = np.arange(256)[:, None, None] >> (3 * turns[:, None] + np.arange(3)) & 1
    return (bits << (7 - turns[:, None])).sum(axis=1).astype(np.uint8)
