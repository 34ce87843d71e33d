"""Annotations of other tools as SA-1B's masks: LabelMe's file beside a picture, COCO's one file for a whole folder."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from embeddings_cache.images.names import stem_of
from embeddings_cache.images.rle import as_json
from students import InputError, first_line

CIRCLE_CORNERS = 64


def labelme_masks(value: Any, size: tuple[int, int]) -> list[dict[str, Any]]:
    """COCO RLEs of the shapes that have an area in LabelMe's JSON; none where it is another tool's.

    Args:
        value: what the JSON says.
        size: (height, width) of the image.

    Raises:
        ValueError: it was drawn on an image of another size, or has shapes but none with an area.
    """
    if not isinstance(value, dict) or not isinstance(value.get("shapes"), list):
        return []
    drawn = [value.get("imageHeight"), value.get("imageWidth")]
    if None not in drawn and drawn != list(size):
        raise ValueError(f"annotated at {drawn}, the image has {list(size)} (height, width)")
    outlines = [_outline(shape) for shape in value["shapes"] if isinstance(shape, dict)]
    masks = [polygon_rle([outline], size) for outline in outlines if outline is not None]
    if not masks:
        raise ValueError("it has no polygon, rectangle or circle")
    return masks


def polygon_rle(outlines: Sequence[np.ndarray], size: tuple[int, int]) -> dict[str, Any]:
    """COCO RLE of the union of polygons (N, 2) as (x, y) in pixels; what lies outside of the image is cut off.

    Raises:
        ValueError: coordinates that are no numbers.
    """
    height, width = size
    if not all(np.isfinite(outline).all() for outline in outlines):
        raise ValueError("a polygon with coordinates that are no numbers")
    flat = [np.clip(outline, 0, (width, height)).ravel().tolist() for outline in outlines]
    return as_json(coco_mask.merge(coco_mask.frPyObjects(flat, height, width)))


def _outline(shape: dict[str, Any]) -> np.ndarray | None:
    """The corners (N, 2) of a LabelMe shape that has an area."""
    points, kind = _points(shape.get("points")), shape.get("shape_type") or "polygon"
    if kind == "polygon" and len(points) >= 3:
        return points
    if kind == "rectangle" and len(points) in (2, 4):
        (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
        return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    if kind == "circle" and len(points) == 2:
        angles = np.linspace(0, 2 * np.pi, CIRCLE_CORNERS, endpoint=False)
        radius = np.hypot(*(points[1] - points[0]))
        return points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return None


def _points(value: Any) -> np.ndarray:
    """(N, 2), or nothing where a value is something else."""
    try:
        points = np.array(value, dtype=float)
    except (TypeError, ValueError, OverflowError):
        return np.empty((0, 2))
    return points if points.ndim == 2 and points.shape[1] == 2 else np.empty((0, 2))


class CocoFile:
    """One `instances.json` for many pictures: for a picture's key, what SA-1B's JSON would say of it.

    A picture is found by the path that `file_name` says, without suffix, and where a folder is missing there, by its
    name alone.

    Args:
        path: COCO's instances, with `images` and `annotations`.

    Raises:
        InputError: it is something else.
    """

    def __init__(self, path: Path) -> None:
        try:
            content = json.loads(path.read_bytes())
            images = {image["id"]: image for image in content["images"]}
            by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
            for annotation in content["annotations"]:
                by_image[annotation["image_id"]].append(annotation)
        except OSError as error:
            raise InputError(f"data.annotations={path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"data.annotations={path} is not COCO's instances, with images and annotations: {first_line(error)}"
            ) from error
        self._path = path
        self._by_stem: dict[str, dict[str, Any]] = {}
        for image in images.values():
            known = self._by_stem.setdefault(stem_of(_name_of(image, path)), image)
            if known is not image:  # listed twice, or beside one of another kind
                if (known["height"], known["width"]) != (image["height"], image["width"]):
                    raise InputError(f"data.annotations={path}: {image['file_name']} is there in two sizes")
                by_image[known["id"]] += by_image.pop(image["id"], [])
        names = defaultdict(list)
        for stem, image in self._by_stem.items():
            names[PurePosixPath(stem).name].append(image)
        self._by_name = {name: same[0] for name, same in names.items() if len(same) == 1}
        self._by_image = by_image
        self._flat = all("/" not in stem for stem in self._by_stem)

    def __len__(self) -> int:
        """Pictures that it has masks for."""
        return len(self._by_image)

    def __contains__(self, key: object) -> bool:
        """Whether it has masks for the picture with a key."""
        return isinstance(key, str) and bool(self._found(key)[1])

    def annotation(self, key: str) -> bytes | None:
        """SA-1B's JSON for a picture; None where the file does not know it, or has no masks for it."""
        image, found = self._found(key)
        if not found:
            return None
        masks = list(_coco_masks(found, (image["height"], image["width"])))
        return json.dumps({"annotations": [{"segmentation": mask} for mask in masks]}).encode()

    def _found(self, key: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The file's image of a key, and its annotations; nothing of either where there is none."""
        image = self._by_stem.get(key)
        if image is None and (self._flat or "/" not in key):
            image = self._by_name.get(PurePosixPath(key).name)
        return (image, self._by_image.get(image["id"], [])) if image is not None else ({}, [])


def _name_of(image: dict[str, Any], path: Path) -> str:
    name = image.get("file_name")
    sides = image.get("height"), image.get("width")
    if not isinstance(name, str) or not all(type(side) is int and side > 0 for side in sides):
        raise InputError(f"data.annotations={path}: image {image.get('id')} lacks file_name, height or width")
    return name.removeprefix("./")


def _coco_masks(annotations: list[dict[str, Any]], size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """COCO RLEs; those that the file has as RLEs unchecked, for whoever reads SA-1B's JSON checks them."""
    for annotation in annotations:
        drawn = annotation.get("segmentation")
        if isinstance(drawn, list):
            outlines = [np.reshape(_flat(part), (-1, 2)) for part in drawn]
            outlines = [outline for outline in outlines if len(outline) >= 3 and np.isfinite(outline).all()]
            if outlines:
                yield polygon_rle(outlines, size)
        elif isinstance(drawn, dict):
            yield drawn


def _flat(part: Any) -> np.ndarray:
    try:
        values = np.array(part, dtype=float)
    except (TypeError, ValueError, OverflowError):
        return np.empty(0)
    return values if values.ndim == 1 and len(values) % 2 == 0 else np.empty(0)
