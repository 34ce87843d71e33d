"""The encoder as other runtimes get it, and the pictures that prove an export."""

import json
from copy import deepcopy
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from distill.evaluate.compare import make_prompts
from distill.export.proof import PROMPTS
from distill.export.substitutes import for_runtimes
from distill.recipe import Recipe
from embeddings_cache.images import (
    PIXEL_MEAN,
    PIXEL_STD,
    generate_scene,
    normalize,
    resize_longest_side,
    sa1b_annotation,
)
from embeddings_cache.shards import CacheRow, EmbeddingsCache, encode_pixels, is_complete, read_info
from students import InputError, StudentEncoder

CALIBRATION_SEED = 1
"""Of scenes to calibrate on, so that they are not those to compare on."""

NEAR_THE_MEAN = 0.6 / min(PIXEL_STD)
"""After normalisation: what rounding to whole numbers, and to float16, leaves of the mean."""


class RgbEncoder(nn.Module):
    """An encoder with the normalisation inside: RGB 0–255 float32 (B, 3, S, S) → embedding (B, C, h, w).

    Padding has to be the mean colour, which normalises to 0. A student's branches are fused.

    Args:
        encoder: normalised images → embeddings; `img_size` is S.
        eight_bit: pixels are whole numbers, as is the padding's colour. What is that near to the mean becomes 0 too:
            an encoder that normalises its first layer, as ConvNeXt does, would see the padding otherwise.
    """

    def __init__(self, encoder: nn.Module, eight_bit: bool = False) -> None:
        super().__init__()
        fused = encoder.fused() if isinstance(encoder, StudentEncoder) else deepcopy(encoder)
        self.encoder = for_runtimes(fused)
        self.image_size = int(encoder.img_size)  # type: ignore[arg-type]
        self.eight_bit = eight_bit

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        normalized = normalize(image)
        if self.eight_bit:
            normalized = normalized * (normalized.abs() > NEAR_THE_MEAN)
        return self.encoder(normalized)


def pad_with_mean_colour(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resized RGB uint8 (h, w, 3) → float32 (1, 3, size, size), what an exported encoder takes."""
    height, width = pixels.shape[:2]
    padded = np.empty((1, 3, size, size), dtype=np.float32)
    padded[:] = np.array(PIXEL_MEAN, dtype=np.float32)[:, None, None]
    padded[0, :, :height, :width] = pixels.transpose(2, 0, 1)
    return padded


def validation_rows(recipe: Recipe, size: int, images: int) -> tuple[list[CacheRow], str]:
    """So many images to compare on, and where they come from: held-out ones of the recipe's cache whose annotations can
    be decoded, or generated scenes where there is no finished cache of this size."""
    cache = _cache(recipe, size)
    if cache is None:
        return [_scene_row(size, seed) for seed in range(images)], "generated scenes"
    _, held_out = cache.split(min(recipe.data.val_images, len(cache) - 1))
    rows = (row for row in (cache[index] for index in held_out) if _has_prompts(row))
    found = list(islice(rows, images))
    if not found:
        raise InputError(f"{recipe.cache.dir}: no held-out image has an annotation that can be decoded")
    return found, f"held-out images of {Path(recipe.cache.dir).name}"


def calibration_pictures(recipe: Recipe, size: int) -> list[np.ndarray]:
    """Resized pictures RGB uint8 (h, w, 3) to find the ranges of activations with: `export.calibration_images` of those
    that the student was trained on, or generated scenes."""
    count = recipe.export.calibration_images
    cache = _cache(recipe, size)
    if cache is None:
        scenes = (generate_scene(np.random.default_rng([CALIBRATION_SEED, seed]), size)[0] for seed in range(count))
        return [resize_longest_side(scene, size) for scene in scenes]
    training, _ = cache.split(min(recipe.data.val_images, len(cache) - 1))
    return [cache[index].pixels() for index in training[:count]]


def _cache(recipe: Recipe, size: int) -> EmbeddingsCache | None:
    directory = Path(recipe.cache.dir)
    info = read_info(directory)
    if info is None or not is_complete(directory, info) or info.identity.image_size != size:
        return None
    cache = EmbeddingsCache(directory)
    return cache if len(cache) > 1 else None


def _has_prompts(row: CacheRow) -> bool:
    try:
        make_prompts(row, PROMPTS)
    except InputError:
        return False
    return True


def _scene_row(size: int, seed: int) -> CacheRow:
    scene, masks = generate_scene(np.random.default_rng([0, seed]), size)
    pixels = resize_longest_side(scene, size)
    sizes = (scene.shape[0], scene.shape[1]), (pixels.shape[0], pixels.shape[1])
    annotation = json.dumps(sa1b_annotation(seed, scene, masks))
    return CacheRow(f"scene-{seed}", np.empty(0), encode_pixels(pixels, "png"), *sizes, annotation)
