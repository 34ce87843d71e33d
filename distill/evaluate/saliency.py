"""Saliency: what stands out in a photograph, on DUTS's test set, as RepViT-SAM's paper has it (arXiv:2312.05760).

Everything in the photograph is segmented, with segment-anything's default settings. Of the masks the one with the
highest Dice to the truth is compared with it: the mean absolute error, which of two masks is the share of pixels that
differ. As in pysodmetrics, the truth is what is brighter than 128. SAM's papers on such sets choose by IoU
(arXiv:2304.06022), which is the same mask, for Dice rises with it.

Where no mask is kept, the error is 1, the worst there is; `empty` is the share of such images. Where nothing is salient
in the truth, every Dice counts as 0, and the mask is the one with the highest predicted IoU.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill.evaluate.decoding import Paired, Segmenter, pair, read_photograph, write_map
from distill.evaluate.everything import everything
from distill.reading import reading_of
from distill.recipe import Recipe
from embeddings_cache.images import decode_rle
from students import InputError

COLUMNS = ("MAE", "empty")
UNIT = "images"

SALIENT = 128
"""Above it is the truth."""


def settings(recipe: Recipe) -> dict[str, Any]:
    """Nothing that a recipe says: segment-anything's defaults are the protocol."""
    return {}


def find(recipe: Recipe) -> list[Paired]:
    """The images of DUTS-TE, by name.

    Raises:
        InputError: no such folders, no image, or one without its mask.
    """
    root = Path(recipe.evaluate.data)
    for folder in (root, root / "DUTS-TE"):
        masks = folder / "DUTS-TE-Mask"
        if found := sorted((folder / "DUTS-TE-Image").glob("*.jpg")):
            return pair(found, masks, ".png")
    raise InputError(
        f"evaluate.data={root} is not laid out as DUTS: DUTS-TE-Image/*.jpg and DUTS-TE-Mask/*.png, within it or "
        "within DUTS-TE/"
    )


def measure(item: Paired, segmenter: Segmenter, recipe: Recipe, pictures: Path) -> dict[str, Any]:
    """The error and the Dice of the best mask, which goes to `pictures`, and how many masks there are."""
    reading = reading_of(recipe)
    image, truth = read_photograph(item.image, reading), read_photograph(item.truth, reading)[..., 0] > SALIENT
    if truth.shape != image.shape[:2]:
        raise InputError(f"{item.truth.name} is not of an image of {image.shape[1]}×{image.shape[0]} px")
    found = everything(segmenter, image)
    if not found:
        return {"mae": 1.0, "dice": 0.0, "masks": 0}
    mask = max((decode_rle(each["segmentation"]) for each in found), key=lambda mask: dice(mask, truth))
    write_map(pictures / f"{item.key}.png", mask)
    return {"mae": float((mask != truth).mean()), "dice": dice(mask, truth), "masks": len(found)}


def summarize(results: Mapping[str, dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Means over the images."""
    return {
        "MAE": float(np.mean([each["mae"] for each in results.values()])),
        "empty": float(np.mean([each["masks"] == 0 for each in results.values()])),
    }


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """Twice what two boolean (H, W) have in common, of what both have; 0 where there is no truth."""
    return float(2 * (mask & truth).sum() / (mask.sum() + truth.sum())) if truth.any() else 0.0
