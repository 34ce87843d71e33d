"""SA-1B's JSON: masks as COCO run-length encodings, and the prompts that are made from them."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from scipy.ndimage import distance_transform_edt


def usable_annotation(encoded: bytes, size: tuple[int, int]) -> str | None:
    """The JSON's text if it lists masks as SA-1B does, None if it says something else.

    WebDataset tars of other origins keep captions, polygons and the like in their `.json`; those are photographs
    without annotations to us.

    Args:
        encoded: the JSON file.
        size: (height, width) of its image.

    Raises:
        ValueError: not JSON, not UTF-8, or masks of another size than the image's.
    """
    text = encoded.decode()
    value = json.loads(text)
    entries = value.get("annotations") if isinstance(value, dict) else None
    if not isinstance(entries, list) or not entries:
        return None
    masks = [entry.get("segmentation") if isinstance(entry, dict) else None for entry in entries]
    if not all(isinstance(mask, dict) and {"size", "counts"} <= mask.keys() for mask in masks):
        return None
    sizes = [entry["segmentation"]["size"] for entry in entries]
    if others := [other for other in sizes if other != list(size)]:
        raise ValueError(f"annotated at {others[0]}, the image has {list(size)} (height, width)")
    return text


def decode_masks(annotation: str) -> Iterator[np.ndarray]:
    """Boolean masks (H, W) of the original image, in the order of the JSON; empty ones left out.

    Raises:
        ValueError: a run-length encoding that is none.
    """
    masks = (decode_rle(entry["segmentation"]) for entry in json.loads(annotation)["annotations"])
    yield from (mask for mask in masks if mask.any())


def decode_rle(segmentation: dict[str, Any]) -> np.ndarray:
    """One COCO RLE, compressed (`counts` a string) or not (a list) → boolean (H, W)."""
    height, width = segmentation["size"]
    if isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(segmentation).astype(bool)


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Boolean (H, W) → compressed COCO RLE with `counts` as text, ready for JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def center_point(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the mask's pixel that is furthest from its boundary, the image's edge included.

    SAM's evaluation clicks there first (arXiv:2304.02643, section 7.1 and appendix D.1).
    """
    left, top, right, bottom = (int(side) for side in bounding_box(mask))
    depth = distance_transform_edt(np.pad(mask[top:bottom, left:right], 1))[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return float(left + x), float(top + y)


def bounding_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) of a mask in pixels, the far edges exclusive: x1 − x0 is its width."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
