"""Prompts to compare decoders with, and what `SamPredictor` makes of them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor

from distill.evaluate.compare import make_prompts
from distill.export.decoder import BOTTOM_RIGHT, PAD, TOP_LEFT
from distill.export.proof import PROMPTS, ParityError, spread
from embeddings_cache.shards import CacheRow

DECODER_IMAGES = 2
"""Images that a decoder is compared on: it depends on the prompts more, of which each image has five."""

GATE_IMAGES = 12
"""The same of decoders with fewer bits, which have to hold the masks of more prompts."""

Prompt = dict[str, np.ndarray]
"""As `SamPredictor.predict` takes it: `point_coords` (N, 2) in pixels of the image and `point_labels` (N,), `box` (4,),
`mask_input` (1, 4h, 4w); any of them."""


def place_embedding(predictor: SamPredictor, embedding: np.ndarray, row: CacheRow) -> None:
    """`SamPredictor.set_image`, for an embedding (1, C, h, w) that is there."""
    predictor.reset_image()
    predictor.features = torch.from_numpy(embedding)
    predictor.original_size, predictor.input_size = row.original_size, row.input_size
    predictor.is_image_set = True


def prompts_of(row: CacheRow) -> Iterator[Prompt]:
    """One to three points, a box, and a point with a box, of an image."""
    found = make_prompts(row, PROMPTS)
    height, width = row.original_size
    whole = np.array([0, 0, width - 1, height - 1])
    box = found.boxes[-1] if found.boxes is not None else whole
    for count in (1, 2, 3):
        points = found.points[:count]
        yield {"point_coords": points, "point_labels": np.arange(len(points)) % 2 ^ 1}
    yield {"box": box}
    yield {"point_coords": found.points[:1], "point_labels": np.ones(1), "box": box}


def points_of(predictor: SamPredictor, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    """Points and box as an exported decoder takes them: float32 (1, N, 2) in pixels of the resized image, and float32
    (1, N), as `SamPredictor` hands them to the prompt encoder."""
    coords = np.asarray(prompt.get("point_coords", np.empty((0, 2))), dtype=np.float64)
    labels = np.asarray(prompt.get("point_labels", np.empty(0)))
    if "box" in prompt:
        coords = np.concatenate([coords, np.reshape(prompt["box"], (2, 2))])
        labels = np.concatenate([labels, [TOP_LEFT, BOTTOM_RIGHT]])
    coords = predictor.transform.apply_coords(coords, predictor.original_size)
    if "box" not in prompt:
        coords = np.concatenate([coords, np.zeros((1, 2))])
        labels = np.concatenate([labels, [PAD]])
    return coords[None].astype(np.float32), labels[None].astype(np.float32)


def predicted(predictor: SamPredictor, prompt: Prompt, single: bool) -> tuple[np.ndarray, ...]:
    """`SamPredictor`'s logits (1, M, H, W), predicted IoUs (1, M) and low-resolution logits (1, M, 4h, 4w), as the file
    orders its masks."""

    def predict(multimask: bool) -> tuple[np.ndarray, ...]:
        return predictor.predict(**prompt, multimask_output=multimask, return_logits=True)

    if not single:
        chosen = [np.concatenate(parts) for parts in zip(predict(False), predict(True), strict=True)]
    elif "box" in prompt or len(prompt["point_coords"]) > 1:
        chosen = list(predict(False))
    else:
        three = predict(True)
        best = int(three[1].argmax())
        chosen = [part[best : best + 1] for part in three]
    return tuple(part[None] for part in chosen)


def difference(found: np.ndarray, expected: np.ndarray, what: str) -> float:
    """The largest |found − expected|.

    Raises:
        ParityError: they have other shapes.
    """
    if found.shape != expected.shape:
        raise ParityError(f"makes {what} of shape {found.shape}, SamPredictor {expected.shape}")
    return float(np.abs(found - expected).max())


def figures(
    images: int, images_from: str, logits: list[float], predicted_ious: list[float], ious: list[float]
) -> dict[str, Any]:
    """What a manifest says of a decoder: the largest differences of logits and of predicted IoUs, and masks' IoUs."""
    return {
        "images": images,
        "images_from": images_from,
        "max_difference": float(np.max(logits)),
        "iou_difference": float(np.max(predicted_ious)),
        "masks": len(ious),
        **spread(ious),
    }
