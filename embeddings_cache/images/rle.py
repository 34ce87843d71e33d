"""COCO's run-length encoding of masks: checked, then left to pycocotools, which reads whatever it is given."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

LARGEST_MASK = 2**31
"""Pixels of a mask that is decoded."""
LONGEST_NUMBER = 7
"""Characters of a compressed count, of 5 bits each; more would not fit into 32 bits."""


def decode_rle(segmentation: Any) -> np.ndarray:
    """One COCO RLE, compressed (`counts` a string) or not (a list) → boolean (H, W).

    Raises:
        ValueError: it is none: runs must be non-negative integers that sum to H·W.
    """
    height, width = check_rle(segmentation)
    if isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(segmentation).view(bool)


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Boolean (H, W) → compressed COCO RLE with `counts` as text, ready for JSON."""
    return as_json(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))


def as_json(rle: dict[str, Any]) -> dict[str, Any]:
    """pycocotools' RLE with `counts` as text."""
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def check_rle(segmentation: Any) -> tuple[int, int]:
    """Height and width of a COCO RLE whose runs cover just that.

    Raises:
        ValueError: says what is wrong with it. pycocotools would read memory that is not its own.
    """
    if not isinstance(segmentation, dict):
        raise ValueError(f"no RLE, but a {type(segmentation).__name__}")
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"an RLE of size {size!r}")
    height, width = size
    if height * width > LARGEST_MASK:
        raise ValueError(f"an RLE of {height}×{width} pixels")
    if isinstance(counts, list):
        if not all(type(run) is int for run in counts):
            raise ValueError("an RLE with runs that are no whole numbers")
        runs = counts
    elif isinstance(counts, str | bytes):
        runs = _decompressed(counts if isinstance(counts, bytes) else counts.encode())
    else:
        raise ValueError(f"an RLE with {type(counts).__name__} for counts")
    if min(runs, default=0) < 0:
        raise ValueError("an RLE with negative runs")
    if (covered := sum(runs)) != height * width:
        raise ValueError(f"an RLE of {covered} pixels for {height}×{width}")
    return height, width


def _decompressed(counts: bytes) -> list[int]:
    """The runs of a compressed RLE (cocoapi's common/maskApi.c, rleFrString).

    Each character holds 5 bits of a number, the lowest first, and in a sixth whether more follow; from the fourth on,
    numbers are differences to the one before the last.
    """
    bits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if len(bits) == 0:
        return []
    if bits.min() < 0 or bits.max() > 63 or bits[-1] & 32:
        raise ValueError("an RLE that is cut short, or text of another kind")
    last = np.flatnonzero(bits & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    if (last - first).max() >= LONGEST_NUMBER:
        raise ValueError("an RLE with a number beyond 32 bits")
    place = np.arange(len(bits)) - np.repeat(first, last - first + 1)
    numbers = np.add.reduceat((bits & 31) << 5 * place, first)
    numbers -= np.where(bits[last] & 16, np.int64(32) << 5 * (last - first), 0)  # the highest bit is the sign
    for chain in (numbers[1::2], numbers[2::2]):
        np.cumsum(chain, out=chain)
    return numbers.tolist()
