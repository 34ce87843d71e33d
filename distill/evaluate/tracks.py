"""Points on objects, followed through a video: those of a file, or of OpenCV's Lucas–Kanade where there is none.

SAM-PT (arXiv:2307.01197, section 3) follows 16 points on an object and one beside it with CoTracker. Its points on the
object are k-medoids of the first frame's mask, the one beside it is any pixel outside. Ours are drawn without chance: a
k-medoids of our own, and a pixel not far away. Lucas–Kanade is a stand-in that shows how students compare to each other
and to the teacher: a point that it loses, behind something or by moving too fast, does not come back.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from embeddings_cache.images import center_point, reason_of
from students import InputError

POSITIVE = 16
"""Points on an object; the last of an object's points is beside it (SAM-PT's for CoTracker)."""

MEDOID_PIXELS, MEDOID_STEPS = 2000, 10
"""Pixels of a mask that are clustered (SAM-PT: 1800), and how often."""

NEAR = 0.1
"""Of the picture's diagonal: the point beside an object is not further from it."""

RETURN = 1.0
"""Pixels: a point that is followed and then followed back ends so close to where it was (Kalal et al., ICPR 2010)."""


@dataclass(frozen=True)
class Tracks:
    """Points of a video.

    Attributes:
        points: float (frames, objects, points, 2) as (x, y) in pixels of the frames; the last of an object's points is
            beside it, the others are on it.
        visible: boolean (frames, objects, points).
    """

    points: np.ndarray
    visible: np.ndarray


def read_tracks(path: Path, frames: int, objects: int) -> Tracks:
    """`points` and `visible` of an `.npz`.

    Raises:
        InputError: there is no such file, it is damaged, or of another video.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            points, visible = file["points"], file["visible"]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # of many kinds, from a reader of a binary format
        raise InputError(f"{path} has no points and visible: {reason_of(error)}") from error
    if points.ndim != 4 or points.shape[2:] != (max(2, points.shape[2]), 2) or points.dtype.kind != "f":
        raise InputError(f"{path}: points are {points.dtype} {points.shape}, not float (frames, objects, 2 or more, 2)")
    if points.shape[:2] != (frames, objects):
        raise InputError(
            f"{path}: points of {points.shape[0]} frames and {points.shape[1]} objects, not of {frames} and {objects}"
        )
    if visible.dtype != bool or visible.shape != points.shape[:3]:
        raise InputError(f"{path}: visible is {visible.dtype} {visible.shape}, not bool {points.shape[:3]}")
    if not np.isfinite(points[visible]).all():
        raise InputError(f"{path}: points that are visible are nowhere")
    return Tracks(points, visible)


def follow_points(frames: Iterable[np.ndarray], points: np.ndarray, there: np.ndarray) -> Tracks:
    """Follow points by pyramidal Lucas–Kanade from frame to frame, and out of each back into the one before.

    Args:
        frames: RGB uint8 (H, W, 3); two at a time are in memory.
        points: (objects, points, 2) in the first frame.
        there: boolean (objects, points), which of them are followed.
    """
    path, visible = [points.astype(np.float32)], [there]
    for before, after in pairwise(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames):
        moved, found = _flow(before, after, path[-1])
        back, returned = _flow(after, before, moved)
        same = np.linalg.norm(back - path[-1], axis=-1) <= RETURN
        visible.append(visible[-1] & found & returned & same)
        path.append(np.where(visible[-1][..., None], moved, path[-1]))
    return Tracks(np.stack(path), np.stack(visible))


def _flow(before: np.ndarray, after: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where points (..., 2) of a grey picture are in the next, and whether they were found (...)."""
    flat = np.ascontiguousarray(points.reshape(-1, 1, 2))
    moved, found, _ = cv2.calcOpticalFlowPyrLK(before, after, flat, np.empty_like(flat))
    return moved.reshape(points.shape), found.reshape(points.shape[:-1]) > 0


def start_points(masks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`POSITIVE` points on each object of a frame, and one beside it.

    Args:
        masks: boolean (H, W), not empty.

    Returns:
        Points (objects, POSITIVE + 1, 2) as (x, y), and which of them there are (objects, POSITIVE + 1): where objects
        fill the picture there is none beside them.
    """
    taken = np.logical_or.reduce(masks)
    beside = [point_beside(mask, taken) for mask in masks]
    points = [[*spread_points(mask), point or (0, 0)] for mask, point in zip(masks, beside, strict=True)]
    there = [[True] * POSITIVE + [point is not None] for point in beside]
    return np.array(points, dtype=np.float64), np.array(there)


def spread_points(mask: np.ndarray, count: int = POSITIVE) -> np.ndarray:
    """Points all over a boolean mask (H, W), (count, 2) as (x, y) of its pixels; one more than once in a tiny mask.

    The deepest pixel first, then each time the one furthest from those before; then each becomes the pixel nearest to
    the mean of those that are nearest to it, a few times, which draws points away from the mask's boundary.
    """
    pixels = np.argwhere(mask)[:, ::-1]
    pixels = pixels[:: math.ceil(len(pixels) / MEDOID_PIXELS)]
    chosen = np.array([center_point(mask)])
    away = np.linalg.norm(pixels - chosen[0], axis=1)
    while len(chosen) < min(count, len(pixels)):
        chosen = np.append(chosen, pixels[away.argmax()][None], axis=0)
        away = np.minimum(away, np.linalg.norm(pixels - chosen[-1], axis=1))
    for _ in range(MEDOID_STEPS):
        _, owner = cKDTree(chosen).query(pixels)
        means = np.array([pixels[owner == number].mean(axis=0) for number in np.unique(owner)])
        chosen = pixels[cKDTree(pixels).query(means)[1]]
    return np.resize(chosen, (count, 2)).astype(np.float64)


def point_beside(mask: np.ndarray, taken: np.ndarray) -> tuple[float, float] | None:
    """The middle of what is free around a boolean mask (H, W), as (x, y); None where nothing is.

    Args:
        mask: of the object.
        taken: of all objects.
    """
    around = (distance_transform_edt(~mask) <= NEAR * math.hypot(*mask.shape)) & ~taken
    return center_point(around) if around.any() else None
