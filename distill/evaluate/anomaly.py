"""Anomalies: from boxes around what may be a defect to its pixels, on MVTec-AD (Segment Any Anomaly, arXiv:2305.10724).

Of a detector's boxes the five with the highest scores, one mask each. An image's anomaly map is Σ mask·score / (1 +
Σ mask), zero where there is no box. Over all pixels of all images of a class, the good ones too, the best F1 that a
threshold on the maps has; of the classes the mean. That is SAA+ (github.com/caoyunkang/Segment-Any-Anomaly,
`confidence_prompting` and `calculate_max_f1`), whose scores are Grounding DINO's times what its visual saliency says:
they are in the file.

There a map has the size of its image and is brought to 400×400 by interpolation; here each mask is, by the nearest
pixel, as the truth is in both. There maps are brought to [0, 1] before, which changes no order, and so no F1.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.evaluate.decoding import Seen, Segmenter, read_photograph
from distill.reading import reading_of
from distill.recipe import Recipe
from embeddings_cache.images import decode_rle, encode_rle
from embeddings_cache.system import read_json, sha256
from students import InputError

COLUMNS = ("F1",)
UNIT = "images"

SIDE, BOXES = 400, 5
GOOD = "good"
"""The folder of images without a defect, and so without a mask."""
NOTHING = (np.zeros((0, 4)), np.zeros(0))
"""Boxes and scores of an image of which a detector says nothing."""


@dataclass(frozen=True)
class Inspected:
    """A photograph of the test set, the picture of its defect, and a detector's boxes.

    Attributes:
        key: class/defect/number.
        truth: None where it is good.
        boxes: (N, 4) as (x0, y0, x1, y1) in pixels.
        scores: (N,).
    """

    key: str
    image: Path
    truth: Path | None
    boxes: np.ndarray
    scores: np.ndarray

    @property
    def files(self) -> Sequence[Path]:
        """The pictures."""
        return (self.image,) if self.truth is None else (self.image, self.truth)


def settings(recipe: Recipe) -> dict[str, Any]:
    """The boxes, by the file's digest."""
    return {"boxes": sha256(Path(recipe.evaluate.boxes or ""))}


def find(recipe: Recipe) -> list[Inspected]:
    """The test images of all classes, by name.

    Raises:
        InputError: no such folders, a defect without its mask, no boxes, or those of other images.
    """
    root = Path(recipe.evaluate.data)
    images = {path.relative_to(root).as_posix(): path for path in sorted(root.glob("*/test/*/*.png"))}
    if not images:
        raise InputError(
            f"evaluate.data={root} is not laid out as MVTec-AD: CLASS/test/DEFECT/*.png and "
            "CLASS/ground_truth/DEFECT/*_mask.png"
        )
    if recipe.evaluate.boxes is None:
        raise InputError("evaluate.task=anomaly takes a detector's boxes: evaluate.boxes=FILE.json")
    boxes = read_boxes(Path(recipe.evaluate.boxes))
    if strangers := boxes.keys() - images.keys():
        raise InputError(f"evaluate.boxes={recipe.evaluate.boxes} is not of {root}, which has no {min(strangers)}")
    items = []
    for name, path in images.items():
        kind, _, defect, _ = name.split("/")
        truth = None if defect == GOOD else root / kind / "ground_truth" / defect / f"{path.stem}_mask.png"
        items.append(Inspected(f"{kind}/{defect}/{path.stem}", path, truth, *boxes.get(name, NOTHING)))
    if missing := [item.truth for item in items if item.truth is not None and not item.truth.exists()]:
        raise InputError(f"there is no {missing[0]}, nor the masks of {len(missing) - 1} other images")
    return items


def measure(item: Inspected, segmenter: Segmenter, recipe: Recipe, pictures: Path) -> dict[str, Any]:
    """Masks as RLEs of 400×400, with their scores, and the truth as another."""
    reading = reading_of(recipe)
    image = read_photograph(item.image, reading)
    height, width = image.shape[:2]
    truth = np.zeros((height, width), bool)
    if item.truth is not None:
        truth = read_photograph(item.truth, reading)[..., 0] > 0
    if truth.shape != (height, width):
        raise InputError(f"{item.key}: its mask is not of an image of {width}×{height} px")
    boxes = item.boxes.clip(0, (width, height, width, height))
    meets = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    best = meets[np.argsort(-item.scores[meets], kind="stable")[:BOXES]]
    masks = masks_in(segmenter.look(image), boxes[best]) if len(best) else []
    return {
        "masks": [encode_rle(mask) for mask in masks],
        "scores": item.scores[best].tolist(),
        "truth": encode_rle(nearest(truth)),
        "left_out": len(boxes) - len(meets),
    }


def summarize(results: Mapping[str, dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """F1 of each class, None where none of its images has a defect, and their mean."""
    by_class: dict[str, list[dict[str, Any]]] = {}
    for key, result in results.items():
        by_class.setdefault(key.split("/")[0], []).append(result)
    classes = {
        name: {
            "images": len(images),
            "F1": best_f1((anomaly_map(each["masks"], each["scores"]), decode_rle(each["truth"])) for each in images),
        }
        for name, images in by_class.items()
    }
    known = [numbers["F1"] for numbers in classes.values() if numbers["F1"] is not None]
    left_out = sum(each["left_out"] for each in results.values())
    without = sum(not each["masks"] for each in results.values())
    numbers = {"F1": float(np.mean(known)) if known else None, "classes": classes, "boxes_left_out": left_out}
    return {**numbers, "note": f"{without} without boxes"} if without else numbers


def read_boxes(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Boxes (N, 4) and scores (N,) by image, from JSON: `{"CLASS/test/DEFECT/000.png": {"boxes": ..., "scores": ...}}`.

    Raises:
        InputError: there is no such file, or something else in it.
    """
    if not path.is_file():
        raise InputError(f"evaluate.boxes={path}: no such file")
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"evaluate.boxes={path} has no boxes by image, but a {type(content).__name__}")
    found = {}
    for name, entry in content.items():
        try:
            scores = np.array(entry["scores"], dtype=float).reshape(-1)
            boxes = np.array(entry["boxes"], dtype=float).reshape(len(scores), 4)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"evaluate.boxes={path}: {name} has no boxes and a score for each: {error!r}") from error
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise InputError(f"evaluate.boxes={path}: {name} has numbers that are not finite")
        found[name] = boxes, scores
    return found


def masks_in(seen: Seen, boxes: np.ndarray) -> list[np.ndarray]:
    """The mask of each box (N, 4), boolean (400, 400)."""
    return [
        nearest(mask)
        for low_res, _ in seen.decode(boxes=boxes)
        for logits in seen.enlarge(low_res[:, 0])
        for mask in (logits > seen.sam.mask_threshold).cpu().numpy()
    ]


def nearest(mask: np.ndarray) -> np.ndarray:
    """(H, W) → (400, 400), by the pixel that OpenCV's INTER_NEAREST takes: ⌊y·H/400⌋, ⌊x·W/400⌋."""
    rows, columns = (np.arange(SIDE) * side // SIDE for side in mask.shape)
    return mask[rows[:, None], columns]


def anomaly_map(masks: Iterable[dict[str, Any]], scores: Iterable[float]) -> np.ndarray:
    """Σ mask·score / (1 + Σ mask) of RLEs: float64 (400, 400)."""
    total, weight = np.zeros((SIDE, SIDE)), np.ones((SIDE, SIDE))
    for rle, score in zip(masks, scores, strict=True):
        mask = decode_rle(rle)
        total += mask * score
        weight += mask
    return total / weight


def best_f1(images: Iterable[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """The highest F1 of "value ≥ threshold" over all thresholds and all pixels of some images.

    Exact: each value is a threshold, as in scikit-learn's `precision_recall_curve`. F1 is 2 TP / (predicted + true).

    Args:
        images: maps and boolean truths of one shape; looked at one by one.

    Returns:
        None where no pixel is true.
    """
    parts = []
    for values, truth in images:
        levels, places = np.unique(values, return_inverse=True)
        parts.append((levels, np.bincount(places.ravel()), np.bincount(places.ravel(), truth.ravel())))
    levels, predicted, true = (np.concatenate(part) for part in zip(*parts, strict=True))
    _, places = np.unique(-levels, return_inverse=True)  # the highest first
    predicted, true = (np.bincount(places, counts).cumsum() for counts in (predicted, true))
    return float((2 * true / (predicted + true[-1])).max()) if true[-1] else None
