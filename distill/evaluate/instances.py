"""Instances: a detector's boxes as prompts, on COCO or any set in its format (arXiv:2304.02643, section 7.4).

The literature has two protocols, and numbers of one do not compare with those of the other. `hdetr`, of RepViT-SAM
(arXiv:2312.05760, by the code of Prompt-Segment-Anything): up to 300 boxes of H-Deformable-DETR with Swin-L, one mask
a box, its score times the predicted IoU; mmdetection's metric, that is AP of up to 100 masks an image, the other
columns of up to 1,000. `vitdet`, of EfficientViT-SAM (arXiv:2402.05008) and TinySAM (arXiv:2312.13789): all boxes of
ViTDet-H, of three masks the one with the highest predicted IoU, the detector's score; COCO's metric, up to 100.
`everything` takes no boxes: all masks of segment-anything's generator, the predicted IoU for a score, classes ignored;
its column is AR100.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.evaluate.coco import average_precision, read_boxes, read_coco
from distill.evaluate.decoding import Seen, Segmenter, best_of, read_photograph
from distill.evaluate.everything import everything
from distill.reading import reading_of
from distill.recipe import Recipe
from distill.schema import PRESETS
from embeddings_cache.images import encode_rle
from embeddings_cache.system import sha256
from students import InputError

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
UNIT = "images"

FEW, MANY = 100, 1000
"""Masks an image and class that count: COCO's number, and the largest of mmdetection's."""


@dataclass(frozen=True)
class Protocol:
    """What becomes of a box.

    Attributes:
        masks: `single`, the mask of an unambiguous prompt; `best`, of three the one with the highest predicted IoU.
        score: `detector`, `times_iou` or, where there is no detector, `predicted_iou`.
        max_dets: boxes an image, the best; None: all.
        refine: once more with the mask and the box (appendix D.4), which gives a single one.
    """

    masks: str
    score: str
    max_dets: int | None
    refine: bool = False


@dataclass(frozen=True)
class Pictured:
    """An image of a set, by the id that it has there."""

    key: str
    image: Path
    id: int
    coco: Path

    @property
    def files(self) -> Sequence[Path]:
        """The picture."""
        return (self.image,)


def protocol_of(recipe: Recipe) -> Protocol:
    """The preset's, with what `evaluate.masks`, `score`, `max_dets` and `refine` say instead."""
    said = recipe.evaluate
    masks, score, max_dets = PRESETS[said.preset]
    return Protocol(said.masks or masks, said.score or score, said.max_dets or max_dets, said.refine)


def settings(recipe: Recipe) -> dict[str, Any]:
    """The protocol, and the files of annotations and boxes."""
    boxes = sha256(Path(recipe.evaluate.boxes)) if recipe.evaluate.boxes else None
    annotations = sha256(read_coco(Path(recipe.evaluate.data)).file)
    return {"preset": recipe.evaluate.preset, **vars(protocol_of(recipe)), "annotations": annotations, "boxes": boxes}


def find(recipe: Recipe) -> list[Pictured]:
    """All images of the set, by id.

    Raises:
        InputError: no such set, or no boxes of it.
    """
    data, boxes = Path(recipe.evaluate.data), recipe.evaluate.boxes
    if recipe.evaluate.preset == "everything":
        said = recipe.evaluate
        given = {"boxes": said.boxes, "masks": said.masks, "score": said.score, "refine": said.refine or None}
        if taken := [f"evaluate.{key}={value}" for key, value in given.items() if value is not None]:
            raise InputError(f"{taken[0]}: evaluate.preset=everything takes none")
    elif boxes is None:
        raise InputError("evaluate.task=instances takes a detector's boxes: evaluate.boxes=RESULTS.json")
    else:
        read_boxes(Path(boxes), data)
    return pictures_of(data)


def pictures_of(data: Path, prefix: str = "") -> list[Pictured]:
    """Images of a set, by id, under keys that begin with a prefix."""
    known = read_coco(data)
    return [Pictured(f"{prefix}{id}", known.path_of(image), id, data) for id, image in sorted(known.images.items())]


def measure(item: Pictured, segmenter: Segmenter, recipe: Recipe, pictures: Path) -> dict[str, Any]:
    """Masks of an image, as `segment_boxes` gives them."""
    if recipe.evaluate.preset != "everything":
        boxes = read_boxes(Path(recipe.evaluate.boxes or ""), item.coco).get(item.id, [])
        return segment_boxes(item, boxes, segmenter, recipe, protocol_of(recipe))
    image = photograph_of(item, recipe)
    first = min(read_coco(item.coco).categories)
    kept = sorted(everything(segmenter, image), key=lambda mask: -mask["predicted_iou"])[: protocol_of(recipe).max_dets]
    return {"masks": [[first, mask["predicted_iou"], mask["segmentation"]["counts"]] for mask in kept], "left_out": 0}


def summarize(results: Mapping[str, dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Average precision and recall, boxes that were left out, and by which protocol."""
    said = recipe.evaluate
    given = {"masks": said.masks, "score": said.score, "max_dets": said.max_dets, "refine": said.refine or None}
    switched = [f"{key}={value}" for key, value in given.items() if value is not None]
    note = ", ".join([said.preset, *switched])
    return {**score_masks(Path(said.data), results, said.preset), "note": note}


def photograph_of(item: Pictured, recipe: Recipe) -> np.ndarray:
    """RGB uint8 (H, W, 3).

    Raises:
        InputError: it cannot be read, is of another size than the set says, or annotated with masks that are none.
    """
    known = read_coco(item.coco)
    said = known.images[item.id]
    known.good_annotations(said)
    image = read_photograph(item.image, reading_of(recipe))
    if image.shape[:2] != (said["height"], said["width"]):
        raise InputError(
            f"{item.image.name} has {image.shape[1]}×{image.shape[0]} px, and {said['width']}×{said['height']} in "
            f"{known.file.name}"
        )
    return image


def segment_boxes(
    item: Pictured, boxes: Sequence[dict[str, Any]], segmenter: Segmenter, recipe: Recipe, protocol: Protocol
) -> dict[str, Any]:
    """A mask a box.

    Args:
        boxes: COCO's results of the image, the best first.

    Returns:
        `masks`, a list of class, score and the RLE's counts; `left_out`, boxes that do not meet the image.
    """
    image = photograph_of(item, recipe)
    height, width = image.shape[:2]
    corners = np.array([box["bbox"] for box in boxes[: protocol.max_dets]], dtype=float).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    within = np.clip(corners, 0, (width, height, width, height))
    meets = (within[:, 2:] > within[:, :2]).all(axis=1)
    masks: list[list[Any]] = []
    if meets.any():
        chosen = [boxes[index] for index in np.flatnonzero(meets)]
        decoded = masks_of(segmenter.look(image), corners[meets], protocol)
        for box, (mask, predicted_iou) in zip(chosen, decoded, strict=True):
            score = box["score"] * (predicted_iou if protocol.score == "times_iou" else 1)
            masks.append([box["category_id"], score, encode_rle(mask)["counts"]])
    return {"masks": masks, "left_out": int(np.count_nonzero(~meets))}


@torch.no_grad()
def masks_of(seen: Seen, boxes: np.ndarray, protocol: Protocol) -> Iterator[tuple[np.ndarray, float]]:
    """For each box (N, 4), (x0, y0, x1, y1) in pixels, its mask, boolean (H, W), and predicted IoU; a few at a time."""
    passes = list(seen.decode(boxes=boxes, multimask=protocol.masks == "best"))
    low_res, predicted_iou = best_of(*(torch.cat(parts) for parts in zip(*passes, strict=True)))
    if protocol.refine:
        passes = list(seen.decode(boxes=boxes, masks=low_res))
        low_res, predicted_iou = best_of(*(torch.cat(parts) for parts in zip(*passes, strict=True)))
    masks = (mask for logits in seen.enlarge(low_res) for mask in (logits > seen.sam.mask_threshold).cpu().numpy())
    yield from zip(masks, predicted_iou.tolist(), strict=True)


def score_masks(data: Path, results: Mapping[str, dict[str, Any]], preset: str, prefix: str = "") -> dict[str, Any]:
    """`COLUMNS` of a set, and how many boxes were left out."""
    known = read_coco(data)
    by_id = {int(key.removeprefix(prefix)): result for key, result in results.items()}
    found = [
        {
            "image_id": id,
            "category_id": category,
            "score": score,
            "segmentation": {"size": [known.images[id]["height"], known.images[id]["width"]], "counts": counts},
        }
        for id, result in by_id.items()
        for category, score, counts in result["masks"]
    ]
    at = average_precision(known, list(by_id), found, (FEW, MANY), classes=preset != "everything")
    rest = MANY if preset == "hdetr" else FEW
    return {
        "AP": at.ap(FEW),
        "AP50": at.ap(rest, iou=0.5),
        "AP75": at.ap(rest, iou=0.75),
        "APs": at.ap(rest, "small"),
        "APm": at.ap(rest, "medium"),
        "APl": at.ap(rest, "large"),
        "AR100": at.ar(FEW),
        "boxes_left_out": sum(result["left_out"] for result in results.values()),
    }
