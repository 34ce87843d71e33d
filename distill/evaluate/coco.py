"""COCO-format sets: where images lie, what is annotated, a detector's boxes, and average precision by pycocotools."""

import contextlib
import io
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from embeddings_cache.images import check_rle
from embeddings_cache.system import read_json
from students import InputError

AREAS = ("all", "small", "medium", "large")


@dataclass(frozen=True)
class CocoSet:
    """Images and annotations of one file.

    Attributes:
        file: the annotations.
        folder: what `file_name`s are relative to.
        images: by id, as the file has them.
        annotations: by id of their image.
        categories: their ids.
    """

    file: Path
    folder: Path
    images: dict[int, dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]
    categories: tuple[int, ...]

    def path_of(self, image: dict[str, Any]) -> Path:
        """Where an image should lie."""
        return self.folder / name_of(image)

    def good_annotations(self, image: dict[str, Any]) -> list[dict[str, Any]]:
        """An image's annotations but for empty masks, which nothing can match.

        Raises:
            InputError: one has no mask, or it was drawn on an image of another size.
        """
        good = []
        for annotation in self.annotations.get(image["id"], []):
            drawn = annotation.get("segmentation")
            try:
                if drawn and isinstance(drawn, list):
                    check_polygons(drawn)
                elif drawn:
                    size = check_rle(drawn)
                    if size != (image["height"], image["width"]):
                        raise ValueError(
                            f"a mask of {size[1]}×{size[0]} px on an image of {image['width']}×{image['height']}"
                        )
            except ValueError as error:
                raise InputError(f"annotation {annotation.get('id')}: {error}") from error
            if drawn and annotation["area"] > 0:
                good.append(annotation)
        return good


def check_polygons(drawn: list[Any]) -> None:
    """Raise `ValueError` unless these are COCO's polygons, each x, y, x, y, ... of three corners or more. pycocotools
    takes four numbers for a box, and fails with fewer."""
    for corners in drawn:
        numbers = isinstance(corners, list) and all(isinstance(number, int | float) for number in corners)
        if not numbers or len(corners) < 6 or len(corners) % 2 or not np.isfinite(corners).all():
            raise ValueError("a polygon that is none")


def name_of(image: dict[str, Any]) -> str:
    """Path of an image; LVIS says it in `coco_url` alone, with COCO's folder (val2017/000000397133.jpg)."""
    return image.get("file_name") or "/".join(str(image.get("coco_url", "")).split("/")[-2:])


@cache
def read_coco(path: Path) -> CocoSet:
    """A set by its annotation file, or by a folder in which there is one: COCO's own (`annotations/instances_*.json`
    beside the folder that its name ends in), or a file beside its images.

    Raises:
        InputError: there is none, or several; it is not COCO's format; the first image is not where any layout has it.
    """
    file = path if path.is_file() else _only_file(path)
    content = read_json(file)
    try:
        images = {image["id"]: image for image in content["images"]}
        annotations = defaultdict(list)
        for annotation in content["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
        categories = tuple(sorted(category["id"] for category in content["categories"]))
        whole = all(name_of(image) and image["height"] > 0 and image["width"] > 0 for image in images.values())
        whole &= all(type(id) is int for id in images)
        whole &= all(
            isinstance(each.get("area"), int | float) and type(each.get("category_id")) is int
            for each in content["annotations"]
        )
        masks = any(each.get("segmentation") for each in content["annotations"]) or not content["annotations"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{file} is not COCO's format: {error!r}") from error
    if not images or not whole:
        raise InputError(f"{file} has no images, or lacks a number or file_name, height, width, area or category_id")
    if not masks:
        raise InputError(f"{file} has boxes alone, and no segmentation")
    first = name_of(next(iter(images.values())))
    split = file.stem.rsplit("_", 1)[-1]
    beside = file.parent.parent if file.parent.name == "annotations" else file.parent
    folders = [beside / split, beside / "images" / split, beside / "images", beside, file.parent]
    found = [folder for folder in folders if any((folder / name_of(image)).exists() for image in _some(images))]
    if not found:
        looked = ", ".join(str(folder) for folder in dict.fromkeys(folders))
        raise InputError(f"{file}: its images are not there; {first} was looked for in {looked}")
    return CocoSet(file, found[0], images, dict(annotations), categories)


def _some(images: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Enough of them to tell where they lie though one is missing."""
    return list(images.values())[:20]


def _only_file(folder: Path) -> Path:
    patterns = ("annotations/instances_val*.json", "annotations/*.json", "*.json")
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:4])
            raise InputError(f"evaluate.data={folder} has several annotation files, {names}: name one of them")
        if found:
            return found[0]
    raise InputError(f"evaluate.data={folder} has no annotations in COCO's format: {' or '.join(patterns)}")


@cache
def read_boxes(path: Path, coco: Path) -> dict[int, list[dict[str, Any]]]:
    """A detector's boxes by image, best first: `image_id`, `category_id`, `bbox` (x, y, w, h) and `score` of each.

    Args:
        path: COCO's results file.
        coco: the set that they are of, as `read_coco` takes it.

    Raises:
        InputError: it is something else, or of another set.
    """
    known, content = read_coco(coco), read_json(path)
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    try:
        for entry in content:
            box = [float(side) for side in entry["bbox"]]
            if len(box) != 4 or not np.isfinite([*box, float(entry["score"])]).all():
                raise ValueError(f"bbox {entry['bbox']}, score {entry['score']}")
            by_image[entry["image_id"]].append({**entry, "bbox": box, "category_id": int(entry["category_id"])})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"evaluate.boxes={path} is not a results file of COCO's: {error!r}") from error
    strangers = by_image.keys() - known.images.keys()
    kinds = {entry["category_id"] for entries in by_image.values() for entry in entries} - set(known.categories)
    if not by_image or strangers or kinds:
        what = f"image_id {min(strangers)}" if strangers else f"category_id {min(kinds)}" if kinds else "no boxes"
        raise InputError(f"evaluate.boxes={path} is not of {known.file}: {what}")
    return {image: sorted(entries, key=lambda entry: -entry["score"]) for image, entries in by_image.items()}


def average_precision(
    known: CocoSet,
    images: Collection[int],
    found: Sequence[dict[str, Any]],
    max_dets: Sequence[int],
    classes: bool = True,
) -> "Precision":
    """Precision and recall of masks, by pycocotools.

    Args:
        known: the truth.
        images: ids of those that were segmented; others do not count.
        found: COCO's results, with `segmentation`.
        max_dets: numbers of masks an image and class that are looked at, ascending.
        classes: whether a mask must be of the annotation's class.
    """
    truth = COCO()
    # Numbered from 1, whatever they were: pycocotools takes a match with an annotation of id 0 for none.
    annotated = (annotation for image in images for annotation in known.good_annotations(known.images[image]))
    truth.dataset = {
        "info": {},
        "images": [known.images[image] for image in images],
        "annotations": [
            {"iscrowd": 0, **annotation, "id": number} for number, annotation in enumerate(annotated, start=1)
        ],
        "categories": [{"id": category} for category in known.categories],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of each step
        truth.createIndex()
        if not found:
            return Precision(None, max_dets)
        evaluation = COCOeval(truth, truth.loadRes(list(found)), "segm")
        evaluation.params.maxDets = list(max_dets)
        evaluation.params.useCats = int(classes)
        evaluation.evaluate()
        evaluation.accumulate()
    return Precision(evaluation.eval, max_dets)


class Precision:
    """What `COCOeval` accumulated: means over classes, IoUs from 0.5 to 0.95 and recalls."""

    def __init__(self, accumulated: dict[str, Any] | None, max_dets: Sequence[int]) -> None:
        self.accumulated, self.max_dets = accumulated, list(max_dets)

    def ap(self, max_dets: int, area: str = "all", iou: float | None = None) -> float | None:
        """Average precision, at one IoU or over all; None where nothing of that size is annotated."""
        if self.accumulated is None:
            return 0.0
        values = self.accumulated["precision"][..., AREAS.index(area), self.max_dets.index(max_dets)]
        return _mean(values if iou is None else values[round((iou - 0.5) / 0.05)])

    def ar(self, max_dets: int) -> float | None:
        """Average recall, over IoUs."""
        if self.accumulated is None:
            return 0.0
        return _mean(self.accumulated["recall"][..., 0, self.max_dets.index(max_dets)])


def _mean(values: np.ndarray) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None
