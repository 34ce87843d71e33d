"""The outlines of a mask."""

from itertools import pairwise

import numpy as np
from contourpy import FillType, contour_generator

INFINITY = 1e30


def outlines(logits: np.ndarray, tolerance: float) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Where logits (H, W) cross 0, between pixels: outer rings with the holes in each.

    Args:
        logits: above 0 on the object.
        tolerance: pixels by which a ring may leave the outline.

    Returns:
        Rings (N, 2) of x and y, without the first point again; a pixel's centre is its number + ½, as COCO counts.
    """
    inside = logits > 0
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return []
    top, left = max(rows[0] - 1, 0), max(columns[0] - 1, 0)
    part = np.pad(logits[top : rows[-1] + 2, left : columns[-1] + 2], 1, mode="edge")
    for edge in (part[0], part[-1], part[:, 0], part[:, -1]):  # an object that reaches the border ends at it
        np.negative(np.abs(edge), out=edge)
    generator = contour_generator(z=part, fill_type=FillType.OuterOffset)
    shift = np.array([left - 0.5, top - 0.5])
    found = []
    for points, offsets in zip(*generator.filled(0.0, INFINITY), strict=True):
        rings = [points[start : stop - 1] + shift for start, stop in pairwise(offsets)]
        outer, *holes = [simplified(ring, tolerance) for ring in rings]
        if len(outer) >= 3:
            found.append((outer, [hole for hole in holes if len(hole) >= 3]))
    return found


def simplified(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """A ring (N, 2) with fewer points, none of those left out further than `tolerance` from it (Ramer, Douglas and
    Peucker's algorithm, from the two points that are furthest apart)."""
    if tolerance <= 0 or len(ring) < 4:
        return ring
    far = int(np.square(ring - ring[0]).sum(axis=1).argmax())
    closed = np.concatenate([ring, ring[:1]])
    keep = np.zeros(len(closed), bool)
    keep[[0, far, -1]] = True
    parts = [(0, far), (far, len(ring))]
    while parts:
        first, last = parts.pop()
        if last - first < 2:
            continue
        start, between = closed[first], closed[first + 1 : last] - closed[first]
        along = closed[last] - start
        length = np.hypot(*along)
        # Of points beyond the ends the nearest end counts.
        share = np.clip(between @ along / length**2, 0, 1) if length else np.zeros(len(between))
        away = np.hypot(*(between - share[:, None] * along).T)
        worst = int(away.argmax())
        if away[worst] > tolerance:
            middle = first + 1 + worst
            keep[middle] = True
            parts += [(first, middle), (middle, last)]
    return closed[:-1][keep[:-1]]
