"""What is known of an image: masks, kept as SA-1B's JSON has them, and the prompts that are made from them."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from embeddings_cache.images.depth import deepest_pixel
from embeddings_cache.images.polygons import labelme_masks
from embeddings_cache.images.rle import check_rle, decode_rle


def usable_annotation(encoded: bytes, size: tuple[int, int], noted: Callable[[str], object]) -> str | None:
    """The text of SA-1B's JSON if a file lists masks as SA-1B does, or as LabelMe; None if it says something else.

    WebDataset tars of other origins keep captions and the like in their `.json`; those are photographs without
    annotations to us, and nothing is said of them. So is one whose `.json` cannot be read.

    Args:
        encoded: the JSON file: UTF-8, UTF-16 or UTF-32, with or without a byte order mark.
        size: (height, width) of its image.
        noted: is told why the file, or some of its masks, cannot be used.
    """
    try:
        text = encoded.decode(json.detect_encoding(encoded))
        value = json.loads(text)
        if masks := labelme_masks(value, size):
            return json.dumps({"annotations": [{"segmentation": mask} for mask in masks]})
        good = _good_entries(value, size, noted)
        if not good or len(good) == len(value["annotations"]):
            return text if good else None
        return json.dumps({**value, "annotations": good})
    except UnicodeDecodeError as error:
        noted(f"annotation not used: not {error.encoding}")
    except json.JSONDecodeError as error:
        noted(f"annotation not used: {'it is empty' if not encoded.strip() else f'not JSON: {error.msg}'}")
    except (ValueError, RecursionError) as error:
        noted(f"annotation not used: {error}")
    return None


def _good_entries(value: Any, size: tuple[int, int], noted: Callable[[str], object]) -> list[dict[str, Any]]:
    """The entries of SA-1B's JSON whose masks are such; none where it is another tool's.

    Raises:
        ValueError: masks of another size than the image's.
    """
    entries = value.get("annotations") if isinstance(value, dict) else None
    entries = entries if isinstance(entries, list) else []
    found = [entry.get("segmentation") if isinstance(entry, dict) else None for entry in entries]
    masks = [mask for mask in found if isinstance(mask, dict) and {"size", "counts"} <= mask.keys()]
    if not masks or len(masks) < len(entries):
        if not isinstance(value, dict) or "annotations" in value:
            noted("annotation not used: it lists no masks as SA-1B does")
        return []
    if others := [mask["size"] for mask in masks if mask["size"] != list(size)]:
        raise ValueError(f"annotated at {others[0]}, the image has {list(size)} (height, width)")
    good = []
    for entry in entries:
        try:
            check_rle(entry["segmentation"])
            good.append(entry)
        except ValueError as error:
            noted(f"a mask not used: {error}")
    return good


def decode_masks(annotation: str) -> Iterator[np.ndarray]:
    """Boolean masks (H, W) of the original image, in the order of the JSON; empty ones left out.

    Raises:
        ValueError: a run-length encoding that is none.
    """
    masks = (decode_rle(entry["segmentation"]) for entry in json.loads(annotation)["annotations"])
    yield from (mask for mask in masks if mask.any())


def center_point(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the mask's pixel that is furthest from its boundary, the image's edge included.

    SAM's evaluation clicks there first (arXiv:2304.02643, section 7.1 and appendix D.1).
    """
    left, top, right, bottom = (int(side) for side in bounding_box(mask))
    y, x = deepest_pixel(mask[top:bottom, left:right])
    return float(left + x), float(top + y)


def bounding_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) of a mask in pixels, the far edges exclusive: x1 − x0 is its width."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
