"""The proof that an exported encoder is the student: embeddings, and the masks that the decoder makes of them.

A file gets its final name only after it. The student itself goes along the path that it was trained on; the file gets
what its reader will give it.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import nn

from distill.evaluate.compare import make_prompts, predict_masks
from distill.evaluate.ious import mask_iou
from distill.schema import EvaluateRecipe
from embeddings_cache.images import pad_pixels, resize_longest_side, to_encoder_input
from embeddings_cache.shards import CacheRow
from students import CheckFailed, InputError

PROMPTS = EvaluateRecipe(masks_per_image=5, grid=3)
"""Prompts of each kind an image; side of the grid where there is no annotation."""

Encode = Callable[[np.ndarray], np.ndarray]
"""A picture resized to what the encoder takes, RGB uint8 (h, w, 3) → its embedding, float32 (1, C, h, w)."""


class ParityError(CheckFailed):
    """A file does not do what the student does."""


@dataclass(frozen=True)
class Bounds:
    """What a file may differ by; None where a figure is told and not bounded."""

    max_difference: float | None = None
    relative_error: float | None = None
    mask_miou: float | None = None
    mask_iou_p5: float | None = None
    iou_difference: float | None = None


FLOAT16 = Bounds(relative_error=1e-2, mask_miou=0.995)
"""Of everything that computes in float16."""

COMPRESSED = Bounds(relative_error=0.15, mask_miou=0.98, mask_iou_p5=0.9)
"""Of weights, or of everything, in 8 bits and fewer. The masks decide, and the worst twentieth of them as well as their
mean: a mean of 0.98 hides masks that are wrong. An embedding further off than that is another one."""

POOR = 0.9
"""IoU below which a mask is told apart from its original at a glance."""


class Reference:
    """What PyTorch makes of some images: the measure for every file.

    Args:
        encoder: normalised (1, 3, S, S) → (1, C, h, w), with an attribute `img_size`, S; on the CPU, in eval mode.
        decoder: whose prompt encoder and mask decoder make the masks; None where there is none.
        rows: the images, at least one, with annotations that can be decoded; resized to what the encoder takes.
        images_from: where they come from, for the manifest.

    Raises:
        InputError: the encoder makes numbers that are not finite.
    """

    def __init__(
        self, encoder: nn.Module, decoder: Sam | None, rows: list[CacheRow], images_from: str = "memory"
    ) -> None:
        self.decoder, self.rows, self.images_from = decoder, rows, images_from
        self.image_size = int(encoder.img_size)  # type: ignore[arg-type]
        self.pictures = [resize_longest_side(row.pixels(), self.image_size) for row in rows]
        self.embeddings = [_embed(encoder, *pair) for pair in zip(rows, self.pictures, strict=True)]
        self.channels = self.embeddings[0].shape[1]
        self.masks = [list(self._decode(*pair)) for pair in zip(rows, self.embeddings, strict=True)]

    def parity(self, encode: Encode) -> dict[str, Any]:
        """How an encoder compares: the largest difference and the largest relative error ‖a − b‖ / ‖b‖ of an image's
        embedding; of the masks from points and boxes the mean IoU, its 5th percentile, and the share below 0.9; NaN
        wherever the file makes one.

        Of `masks`, `empty_masks` are empty in PyTorch, where equal emptiness counts as 1 and proves little.
        """
        differences, errors, ious = [], [], []
        every = zip(self.rows, self.pictures, self.embeddings, self.masks, strict=True)
        for row, picture, expected, masks in every:
            embedding = encode(picture)
            if embedding.shape != expected.shape:
                raise ParityError(f"makes {embedding.shape}, PyTorch {expected.shape}")
            apart = embedding - expected
            differences.append(np.abs(apart).max())
            errors.append(np.linalg.norm(apart) / np.linalg.norm(expected))
            ious += [mask_iou(*pair) for pair in zip(self._decode(row, embedding), masks, strict=True)]
        return {
            "images": len(self.rows),
            "images_from": self.images_from,
            "max_difference": float(np.max(differences)),
            "relative_error": float(np.max(errors)),
            "masks": len(ious),
            "empty_masks": sum(not mask.any() for masks in self.masks for mask in masks),
            **spread(ious),
        }

    def agreement(self, other: "Reference") -> float | None:
        """Mean IoU of the masks with those of another encoder's, of the same images; None where there are none."""
        pairs = zip(self.masks, other.masks, strict=True)
        ious = [mask_iou(*pair) for ours, theirs in pairs for pair in zip(ours, theirs, strict=True)]
        return fmean(ious) if ious else None

    def relative_error(self, encode: Encode) -> float:
        """The relative error of the first image's embedding, without any masks."""
        expected = self.embeddings[0]
        return float(np.linalg.norm(encode(self.pictures[0]) - expected) / np.linalg.norm(expected))

    def _decode(self, row: CacheRow, embedding: np.ndarray) -> Iterator[np.ndarray]:
        """Boolean (H, W) for each point of the image's prompts, then for each box."""
        if self.decoder is None:
            return
        prompts = make_prompts(row, PROMPTS)
        tensor = torch.from_numpy(embedding)
        yield from predict_masks(self.decoder, tensor, row, points=prompts.points)
        if prompts.boxes is not None:
            yield from predict_masks(self.decoder, tensor, row, boxes=prompts.boxes)


def spread(ious: list[float]) -> dict[str, float | None]:
    """Mean, 5th percentile and share below `POOR` of masks' IoUs; None where there are none."""
    if not ious:
        return {"mask_miou": None, "mask_iou_p5": None, "masks_below_0.9": None}
    return {
        "mask_miou": fmean(ious),
        "mask_iou_p5": float(np.percentile(ious, 5)),
        "masks_below_0.9": fmean(iou < POOR for iou in ious),
    }


def within(name: str, parity: dict[str, Any], bounds: Bounds) -> dict[str, Any]:
    """The parity with its bounds, for the manifest.

    Raises:
        ParityError: it is out of bounds, or not a number.
    """
    allowed = {key: bound for key, bound in asdict(bounds).items() if bound is not None and parity.get(key) is not None}
    if not allowed and any(bound is not None for bound in asdict(bounds).values()):
        raise ParityError(f"{name} cannot be compared: there is no decoder to make masks with")
    for key, bound in allowed.items():
        value = parity[key]
        least = key.startswith("mask")
        if not (value >= bound if least else value <= bound):
            sign = "at least" if least else "at most"
            raise ParityError(f"{name} differs from PyTorch: {_WORDS[key]} {value:.3g}, allowed is {sign} {bound:g}")
    return {**parity, "allowed": allowed}


_WORDS = {
    "max_difference": "by",
    "relative_error": "relative error",
    "mask_miou": "mask mIoU",
    "mask_iou_p5": "5th percentile of masks' IoUs",
    "iou_difference": "predicted IoUs by",
}


@torch.no_grad()
def _embed(encoder: nn.Module, row: CacheRow, pixels: np.ndarray) -> np.ndarray:
    padded = pad_pixels(pixels, int(encoder.img_size))[None]  # type: ignore[arg-type]
    image = to_encoder_input(padded, torch.tensor([pixels.shape[:2]])).contiguous(memory_format=torch.channels_last)
    embedding = encoder(image).float().contiguous().numpy()
    if not np.isfinite(embedding).all():
        raise InputError(f"the student itself makes numbers of {row.key} that are not finite: it cannot be exported")
    return embedding
