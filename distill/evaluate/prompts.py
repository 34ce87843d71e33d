"""Prompts: boxes and clicks from the annotations of COCO, LVIS, SA-1B or any set like them, and how well masks fit.

What MobileSAM's, EdgeSAM's, EfficientViT-SAM's and EfficientSAM's papers print: mean IoU over all masks, by the
annotated box and by one to five clicks (`clicks.py`). Crowds do not count, nor objects that cover no pixel.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from distill.evaluate.clicks import MOST_CLICKS, fits_of_boxes, fits_of_clicks
from distill.evaluate.coco import read_coco
from distill.evaluate.decoding import PROMPTS_A_PASS, Paired, Segmenter, read_photograph
from distill.evaluate.instances import Pictured, photograph_of, pictures_of
from distill.evaluate.masks import SIZES
from distill.reading import reading_of
from distill.recipe import Recipe
from embeddings_cache.images import annotated_pictures, bounding_box, decode_masks, is_archive, usable_annotation
from embeddings_cache.system import sha256
from students import InputError

COLUMNS = ("box", "1 click", "2 clicks", "3 clicks", "4 clicks", "5 clicks")
UNIT = "images"


@dataclass(frozen=True)
class Drawn:
    """An annotated object: its area in pixels as the set has it, its box (x0, y0, x1, y1), boolean (H, W)."""

    area: float
    box: tuple[float, float, float, float]
    mask: np.ndarray


def settings(recipe: Recipe) -> dict[str, Any]:
    """The file of annotations, where one is of all images."""
    data = Path(recipe.evaluate.data)
    return {"annotations": None if _beside(data) else sha256(read_coco(data).file)}


def find(recipe: Recipe) -> list[Pictured] | list[Paired]:
    """Those images of the set that have annotations: of a folder in which they lie beside pictures, as SA-1B's do, in
    order of their names; else COCO's, by id.

    Raises:
        InputError: no such set, or none of its images has any.
    """
    data = Path(recipe.evaluate.data)
    if is_archive(recipe.evaluate.data):
        raise InputError(f"evaluate.data={data}: prompts are read from files; unpack it, and name the folder")
    if beside := _beside(data):
        return beside
    known = read_coco(data)
    items = [item for item in pictures_of(data) if item.id in known.annotations]
    if not items:
        raise InputError(f"{known.file} has no annotations")
    return items


def measure(item: Pictured | Paired, segmenter: Segmenter, recipe: Recipe, pictures: Path) -> dict[str, Any]:
    """Of each annotated object: `area` in pixels, the IoU by its `box`, and `clicks`, after each of them."""
    if isinstance(item, Pictured):
        image = photograph_of(item, recipe)
        drawn = _of_coco(item)
    else:
        image = read_photograph(item.image, reading_of(recipe))
        drawn = _of_file(item, (image.shape[0], image.shape[1]))
    result: dict[str, list[Any]] = {"area": [], "box": [], "clicks": []}
    seen = None
    while some := list(islice(drawn, PROMPTS_A_PASS)):
        seen = seen or segmenter.look(image)
        truths = np.stack([each.mask for each in some])
        result["area"] += [each.area for each in some]
        result["box"] += fits_of_boxes(seen, truths, np.array([each.box for each in some]))
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


@cache
def _beside(data: Path) -> list[Paired]:
    """Pictures of a folder that have their annotations beside them. A run asks thrice, and there may be many."""
    return [Paired(*found) for found in annotated_pictures(str(data))] if data.is_dir() else []


def _of_file(item: Paired, size: tuple[int, int]) -> Iterator[Drawn]:
    """The objects of a picture's own annotation, SA-1B's or LabelMe's, as `stage=precompute` takes them.

    Raises:
        InputError: it has none.
    """
    reasons: list[str] = []
    annotation = usable_annotation(item.truth.read_bytes(), size, reasons.append)
    if annotation is None:
        raise InputError(next(iter(reasons), f"{item.truth.name} lists no masks"))
    for mask in decode_masks(annotation):
        yield Drawn(int(mask.sum()), bounding_box(mask), mask)


def _of_coco(item: Pictured) -> Iterator[Drawn]:
    known = read_coco(item.coco)
    said = known.images[item.id]
    size = said["height"], said["width"]
    for annotation in known.good_annotations(said):
        if not annotation.get("iscrowd") and (mask := _decode(annotation["segmentation"], size)).any():
            yield Drawn(annotation["area"], _corners(annotation), mask)


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


def _decode(drawn: Any, size: tuple[int, int]) -> np.ndarray:
    """Polygons or an RLE as COCO draws them: boolean (H, W)."""
    if isinstance(drawn, list) or isinstance(drawn["counts"], list):
        drawn = coco_mask.frPyObjects(drawn, *size)
    return coco_mask.decode(coco_mask.merge(drawn) if isinstance(drawn, list) else drawn).astype(bool)
