"""Prompts: boxes and clicks from the annotations of COCO, LVIS or any set in their format, and how well masks fit.

What MobileSAM's, EdgeSAM's, EfficientViT-SAM's and EfficientSAM's papers print: mean IoU over all masks, by the
annotated box and by one to five clicks (`clicks.py`). Crowds do not count, nor objects that cover no pixel.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from distill.evaluate.clicks import MOST_CLICKS, fits_of_boxes, fits_of_clicks
from distill.evaluate.coco import read_coco
from distill.evaluate.decoding import PROMPTS_A_PASS, Segmenter
from distill.evaluate.instances import Pictured, photograph_of, pictures_of
from distill.evaluate.masks import SIZES
from distill.recipe import Recipe
from embeddings_cache.system import sha256
from students import InputError

COLUMNS = ("box", "1 click", "2 clicks", "3 clicks", "4 clicks", "5 clicks")
UNIT = "images"


def settings(recipe: Recipe) -> dict[str, Any]:
    """The file of annotations."""
    return {"annotations": sha256(read_coco(Path(recipe.evaluate.data)).file)}


def find(recipe: Recipe) -> list[Pictured]:
    """Those images of the set that have annotations, by id.

    Raises:
        InputError: no such set, or none of its images has any.
    """
    data = Path(recipe.evaluate.data)
    known = read_coco(data)
    items = [item for item in pictures_of(data) if item.id in known.annotations]
    if not items:
        raise InputError(f"{known.file} has no annotations")
    return items


def measure(item: Pictured, segmenter: Segmenter, recipe: Recipe, pictures: Path) -> dict[str, Any]:
    """Of each annotated object: `area` in pixels, the IoU by its `box`, and `clicks`, after each of them."""
    image = photograph_of(item, recipe)
    known = read_coco(item.coco)
    annotations = [each for each in known.good_annotations(known.images[item.id]) if not each.get("iscrowd")]
    drawn = [(each, mask) for each in annotations if (mask := _decode(each["segmentation"], image.shape[:2])).any()]
    result: dict[str, list[Any]] = {"area": [each["area"] for each, _ in drawn], "box": [], "clicks": []}
    if not drawn:
        return result
    seen = segmenter.look(image)
    for start in range(0, len(drawn), PROMPTS_A_PASS):
        some = drawn[start : start + PROMPTS_A_PASS]
        truths = np.stack([mask for _, mask in some])
        corners = np.array([_corners(each) for each, _ in some])
        result["box"] += fits_of_boxes(seen, truths, corners)
        result["clicks"] += [list(ious) for ious in zip(*fits_of_clicks(seen, truths, MOST_CLICKS), strict=True)]
    return result


def summarize(results: Mapping[str, dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Mean IoUs over all objects, and over those of COCO's sizes."""
    area = np.array([area for result in results.values() for area in result["area"]])
    boxes = np.array([iou for result in results.values() for iou in result["box"]])
    clicks = np.array([ious for result in results.values() for ious in result["clicks"]]).reshape(-1, MOST_CLICKS)
    columns = dict(zip(COLUMNS, (boxes, *clicks.T), strict=True))
    sizes = {name: (low <= area) & (area < high) for name, (low, high) in SIZES.items()}
    return {
        **{name: float(ious.mean()) if len(ious) else None for name, ious in columns.items()},
        "objects": len(area),
        "by_size": {
            size: {"objects": int(of.sum()), **{name: float(ious[of].mean()) for name, ious in columns.items()}}
            for size, of in sizes.items()
            if of.any()
        },
    }


def _corners(annotation: dict[str, Any]) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) of an annotation's box.

    Raises:
        InputError: it has none.
    """
    try:
        x, y, width, height = (float(side) for side in annotation["bbox"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"annotation {annotation.get('id')} has no bbox: {error!r}") from error
    return x, y, x + width, y + height


def _decode(drawn: Any, size: tuple[int, ...]) -> np.ndarray:
    """Polygons or an RLE as COCO draws them: boolean (H, W)."""
    if isinstance(drawn, list) or isinstance(drawn["counts"], list):
        drawn = coco_mask.frPyObjects(drawn, *size)
    return coco_mask.decode(coco_mask.merge(drawn) if isinstance(drawn, list) else drawn).astype(bool)
