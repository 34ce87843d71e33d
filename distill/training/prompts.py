"""Prompts for training, drawn from an image's annotation as SAM's training draws its first ones."""

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from embeddings_cache.images import bounding_box, decode_rle
from embeddings_cache.shards import CacheRow
from students import first_line

BOX_NOISE, MOST_BOX_NOISE = 0.1, 20.0
"""Standard deviation of a box's corners as a share of its sides, and in pixels (arXiv:2304.02643, appendix A)."""


@dataclass(frozen=True)
class MaskPrompts:
    """Prompts of a batch, in pixels of the encoder's input.

    `points` is float32 (B, N, 2), foreground points as (x, y); `boxes` float32 (B, M, 4) as (x0, y0, x1, y1); `draws`
    float32 (B, N + M, rounds) in [0, 1), which say where in a disagreement a correction goes. `truths` is uint8
    (B, N + M, side, side), of each cell of a low-resolution mask the share that the prompt's mask covers, 255 for all;
    side is 0 where that was not asked for. `labelled` is boolean (B,): whether the image has masks.
    """

    points: torch.Tensor
    boxes: torch.Tensor
    draws: torch.Tensor
    truths: torch.Tensor
    labelled: torch.Tensor

    @classmethod
    def stack(cls, images: "Sequence[MaskPrompts]") -> "MaskPrompts":
        """Prompts of single images, without B → of a batch."""
        return cls(*(torch.stack([getattr(image, name) for image in images]) for name in cls.__annotations__))


def sample_prompts(
    row: CacheRow,
    count: int,
    rounds: int,
    rng: np.random.Generator,
    share_of_points: float = 0.5,
    truth_grid: tuple[int, int] | None = None,
) -> MaskPrompts:
    """Prompts of one image: for some of `count` a point anywhere in a mask, for the rest a box around one.

    Masks are drawn without repetition while there are enough; an image without annotation is asked at random places.
    The box's corners are moved as SAM's training moves them. An annotation that cannot be decoded counts as none,
    with a warning: it must not end a run days after it began.

    Args:
        count: of prompts; the result has N + M = count.
        rounds: corrections to come.
        rng: decides everything.
        share_of_points: of the prompts, rounded up.
        truth_grid: side of the encoder's input and of low-resolution masks; None leaves `truths` empty.
    """
    scale = np.array([row.input_size[1] / row.original_size[1], row.input_size[0] / row.original_size[0]])
    limits = np.array([row.input_size[1], row.input_size[0]], dtype=float)
    clicked = math.ceil(count * share_of_points - 1e-9)  # 0.07 × 100 is a little more than 7
    masks = list(_some_masks(row, count, rng))
    points, boxes = np.empty((clicked, 2)), np.empty((count - clicked, 4))
    for number in range(count):
        mask = masks[number % len(masks)] if masks else None
        if number < clicked:
            points[number] = _any_pixel(mask, rng) * scale if mask is not None else rng.uniform(0, limits)
        else:
            corners = np.reshape(bounding_box(mask), (2, 2)) * scale if mask is not None else _any_box(limits, rng)
            noise = rng.normal(size=(2, 2)) * np.minimum(BOX_NOISE * (corners[1] - corners[0]), MOST_BOX_NOISE)
            boxes[number - clicked] = np.sort(np.clip(corners + noise, 0, limits), axis=0).ravel()
    draws = rng.uniform(size=(count, rounds))
    truths = np.zeros((count, 0, 0), dtype=np.uint8)
    if truth_grid is not None:
        truths = np.zeros((count, truth_grid[1], truth_grid[1]), dtype=np.uint8)
        for number, mask in enumerate(masks):  # which come again where there are fewer than prompts
            truths[number :: len(masks)] = covered_share(mask, row.input_size, *truth_grid)
    floats = [torch.from_numpy(values.astype(np.float32)) for values in (points, boxes, draws)]
    points_, boxes_, draws_ = floats
    return MaskPrompts(points_, boxes_, draws_, torch.from_numpy(truths), torch.tensor(bool(masks)))


def covered_share(mask: np.ndarray, input_size: tuple[int, int], image_size: int, side: int) -> np.ndarray:
    """A mask on the grid of low-resolution masks, which lies over the encoder's padded input.

    Args:
        mask: boolean (H, W), at the size of its photograph.
        input_size: height and width of the photograph within the encoder's input.
        image_size: side of that input, in pixels.
        side: of the grid.

    Returns:
        uint8 (side, side): of each cell the share that the mask covers, 255 for all of it; padding is not covered.
    """
    covered = (mask.view(np.uint8) != 0).view(np.uint8)  # Pillow's arrays have 255 for True
    for axis in (0, 1):
        cells = math.ceil(input_size[axis] * side / image_size)
        length = image_size / side * mask.shape[axis] / input_size[axis]  # of a cell, in the photograph's pixels
        covered = _covered_lengths(covered, np.arange(cells + 1) * length).T / length
    padding = [(0, side - cells) for cells in covered.shape]
    return np.rint(255 * np.pad(covered, padding)).astype(np.uint8)


def _covered_lengths(rows: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Integrals between edges (n + 1, from 0 on) of what stands in rows (H, W), each of which is 1 long: (n, W)."""
    edges = edges.clip(max=len(rows))
    below = np.minimum(edges.astype(int), len(rows) - 1)
    firsts, place = np.unique(below, return_inverse=True)
    dtype = np.int32 if rows.dtype == np.uint8 else rows.dtype
    between = np.add.reduceat(rows, firsts, axis=0, dtype=dtype).cumsum(axis=0)
    summed = np.concatenate([np.zeros_like(between[:1]), between[:-1]])
    return np.diff(summed[place] + (edges - below)[:, None] * rows[below], axis=0)


def has_masks(row: CacheRow) -> bool:
    """Whether an image's annotation has a mask that is not empty."""
    return next(_some_masks(row, 1, np.random.default_rng(0)), None) is not None


def _some_masks(row: CacheRow, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """At most `count` of the annotation's masks that are not empty, boolean (H, W), in a drawn order."""
    if row.annotation is None:
        return
    try:
        entries = json.loads(row.annotation)["annotations"]
        for place in rng.permutation(len(entries)):
            mask = decode_rle(entries[place]["segmentation"])
            if mask.any():
                yield mask
                count -= 1
            if not count:
                return
    except (ValueError, TypeError, KeyError) as error:
        warnings.warn(f"the annotation of {row.key} cannot be decoded: {first_line(error)}", stacklevel=2)


def _any_pixel(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(x, y), the number of one of a mask's pixels: to its centre the prompt encoder comes by itself."""
    y, x = np.unravel_index(rng.choice(np.flatnonzero(mask)), mask.shape)
    return np.array([x, y])


def _any_box(limits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two corners (2, 2) anywhere in an image."""
    return np.sort(rng.uniform(0, limits, size=(2, 2)), axis=0)
