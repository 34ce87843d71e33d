"""Prompts: boxes and clicks from the annotations of COCO, LVIS or any set in their format, and how well masks fit.

What MobileSAM's, EdgeSAM's, EfficientViT-SAM's and EfficientSAM's papers print: mean IoU over all masks, by the
annotated box and by one to five clicks. Clicks are SAM's (arXiv:2304.02643, appendix D.1): the first is the pixel
deepest inside the mask, each that follows the one deepest inside of what is wrong, on the object or beside it; the
decoder sees all of them and its last logits. After one click the mask is, of three, the one with the highest predicted
IoU; then, and for a box, the single one. Crowds do not count, nor objects that cover no pixel.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from distill.evaluate.coco import read_coco
from distill.evaluate.decoding import PROMPTS_A_PASS, Seen, Segmenter, best_of
from distill.evaluate.instances import Pictured, photograph_of, pictures_of
from distill.evaluate.masks import SIZES, mask_ious
from distill.recipe import Recipe
from embeddings_cache.images import center_point
from embeddings_cache.system import sha256
from students import InputError

CLICKS = 5
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
        corners = np.array([each["bbox"] for each, _ in some], dtype=float)
        corners[:, 2:] += corners[:, :2]
        result["box"] += next(fits(seen, truths, boxes=corners))
        result["clicks"] += [list(ious) for ious in zip(*fits(seen, truths), strict=True)]
    return result


def summarize(results: Mapping[str, dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Mean IoUs over all objects, and over those of COCO's sizes."""
    area = np.array([area for result in results.values() for area in result["area"]])
    boxes = np.array([iou for result in results.values() for iou in result["box"]])
    clicks = np.array([ious for result in results.values() for ious in result["clicks"]]).reshape(-1, CLICKS)
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


@torch.no_grad()
def fits(seen: Seen, truths: np.ndarray, boxes: np.ndarray | None = None) -> Iterator[list[float]]:
    """IoUs of N objects' masks with the truth, by a box each; or after one click, after two, and so on.

    Args:
        truths: boolean (N, H, W), none of them empty.
        boxes: (N, 4) as (x0, y0, x1, y1) in pixels.

    Yields:
        N IoUs; once for boxes, `CLICKS` times without.
    """
    if boxes is not None:
        [(low_res, _)] = seen.decode(boxes=boxes)
        yield mask_ious(_enlarged(seen, low_res[:, 0]), torch.from_numpy(truths))
        return
    points = np.array([[center_point(truth)] for truth in truths])
    labels = np.ones(points.shape[:2])
    earlier: torch.Tensor | None = None
    for number in range(CLICKS):
        [found] = seen.decode(points=points, labels=labels, masks=earlier, multimask=number == 0)
        earlier, _ = best_of(*found)
        masks = _enlarged(seen, earlier)
        yield mask_ious(masks, torch.from_numpy(truths))
        if number < CLICKS - 1:
            clicks = [next_click(mask, truth) for mask, truth in zip(masks.numpy(), truths, strict=True)]
            points = np.concatenate([points, np.array([[(x, y)] for x, y, _ in clicks])], axis=1)
            labels = np.concatenate([labels, np.array([[label] for *_, label in clicks])], axis=1)


def next_click(mask: np.ndarray, truth: np.ndarray) -> tuple[float, float, int]:
    """(x, y, label) of the pixel deepest inside of where a boolean mask (H, W) is wrong; label −1 is no click, where it
    is not."""
    wrong = mask ^ truth
    if not wrong.any():
        return 0.0, 0.0, -1
    x, y = center_point(wrong)
    return x, y, int(truth[int(y), int(x)])


def _enlarged(seen: Seen, low_res: torch.Tensor) -> torch.Tensor:
    """Low-resolution logits → boolean masks (N, H, W) on the CPU."""
    return torch.cat([(logits > seen.sam.mask_threshold).cpu() for logits in seen.enlarge(low_res)])


def _decode(drawn: Any, size: tuple[int, ...]) -> np.ndarray:
    """Polygons or an RLE as COCO draws them: boolean (H, W)."""
    if isinstance(drawn, list) or isinstance(drawn["counts"], list):
        drawn = coco_mask.frPyObjects(drawn, *size)
    return coco_mask.decode(coco_mask.merge(drawn) if isinstance(drawn, list) else drawn).astype(bool)
