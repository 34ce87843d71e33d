"""The pixel deepest inside a mask, for which the depth of all the others need not be known."""

import math

import numpy as np
from scipy.ndimage import distance_transform_edt

LARGEST_CELL = 8
FINER = 2
"""Side of square cells in pixels, and how many times finer each look is than the one before; the last is at pixels."""
AT_ONCE = 1 << 20
"""Distances that are compared at a time."""
FEW = 1 << 14
"""Pixels whose depths are found as fast as the deepest of them."""


def deepest_pixel(mask: np.ndarray) -> tuple[int, int]:
    """(row, column) of the pixel that is furthest from what is outside a boolean mask (H, W), not an empty one; beyond
    the edges is outside. Of several the first, row by row: as `argmax` of the Euclidean distance transform.

    Depth changes by no more than the way between two pixels. So where the middle of a cell is known to be shallow, no
    pixel of that cell is the deepest, and few cells are left to be looked at more closely.
    """
    if mask.size < FEW:
        return _deepest_of_all(mask)
    turned = mask.shape[0] > mask.shape[1]  # distances along the shorter side are fewer to compare
    inside = _framed(mask.T if turned else mask)
    along = _distances_along_columns(inside)

    side = LARGEST_CELL
    held = _held(inside, side)
    rough = distance_transform_edt(held == side**2)
    slack = math.hypot(side - 1, side - 1)  # a pixel is as deep as its cell is, in cells, give or take so much
    cells = np.argwhere((held > 0) & (rough >= rough.max() - 2 * slack / side)) * side
    deepest = side * rough.max() + slack
    while True:
        reach = math.floor(deepest)
        if len(cells) * (2 * reach + 1) > mask.size:  # stripes or noise, say: nearly all of it is as deep
            return _deepest_of_all(mask)
        depths = _depths(along, cells + side // 2, reach)
        if side == 1:
            break
        slack = math.hypot(side // 2, side // 2) + 1e-6
        deepest = depths.max() + slack
        side //= FINER
        finer = np.argwhere(np.ones((FINER, FINER), dtype=bool)) * side
        cells = (cells[depths + slack >= depths.max()][:, None] + finer).reshape(-1, 2)
    found = cells[depths == depths.max()] - 1
    row, column = min((found[:, ::-1] if turned else found).tolist())
    return row, column


def _deepest_of_all(mask: np.ndarray) -> tuple[int, int]:
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return int(row), int(column)


def _framed(mask: np.ndarray) -> np.ndarray:
    """A mask with pixels outside around it, and as many below and to the right as cells need."""
    height, width = (-(-(side + 2) // LARGEST_CELL) * LARGEST_CELL for side in mask.shape)
    framed = np.zeros((height, width), dtype=bool)
    framed[1 : 1 + mask.shape[0], 1 : 1 + mask.shape[1]] = mask
    return framed


def _held(inside: np.ndarray, side: int) -> np.ndarray:
    """How many pixels of each cell are inside."""
    bands = inside.reshape(-1, side, inside.shape[1]).sum(axis=1, dtype=np.uint8)
    return bands.reshape(len(bands), -1, side).sum(axis=2, dtype=np.uint16)


def _distances_along_columns(inside: np.ndarray) -> np.ndarray:
    """Pixels from each one to the nearest outside in its column, (H, W); the first and the last row are outside."""
    rows = np.arange(len(inside), dtype=np.int32)[:, None]
    above = np.maximum.accumulate(np.where(inside, np.int32(0), rows))
    below = np.minimum.accumulate(np.where(inside, np.int32(len(inside)), rows)[::-1])[::-1]
    return np.minimum(rows - above, below - rows)


def _depths(along: np.ndarray, pixels: np.ndarray, reach: int) -> np.ndarray:
    """Distances of pixels (N, 2) to the nearest outside, none of which is beyond `reach`: the second pass of an exact
    distance transform (Felzenszwalb and Huttenlocher, Theory of Computing 8, 2012, section 3)."""
    offsets = np.arange(-reach, reach + 1, dtype=np.int32)
    squares = np.empty(len(pixels), dtype=np.int32)
    some = max(1, AT_ONCE // len(offsets))
    for first in range(0, len(pixels), some):
        rows, columns = pixels[first : first + some, :, None].transpose(1, 0, 2)
        # Beyond the frame's edges lies nothing nearer than the edge.
        columns_near = (columns + offsets).clip(0, along.shape[1] - 1)
        squares[first : first + some] = (along[rows, columns_near] ** 2 + (columns_near - columns) ** 2).min(axis=1)
    return np.sqrt(squares)
