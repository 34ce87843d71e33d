"""The encoder as other runtimes get it, and the pictures that prove an export."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from distill.recipe import Recipe
from embeddings_cache.format import read_info
from embeddings_cache.preprocess import PIXEL_MEAN, normalize, pad_pixels, resize_longest_side, to_encoder_input
from embeddings_cache.reader import EmbeddingsCache, is_complete
from embeddings_cache.scenes import generate_scene
from students import StudentEncoder

PICTURES = 4


class RgbEncoder(nn.Module):
    """A student, fused, with the normalisation inside: RGB 0–255 float32 (B, 3, S, S) → embedding (B, C, S/16, S/16).

    Padding has to be the mean colour, which normalises to 0.
    """

    def __init__(self, student: StudentEncoder) -> None:
        super().__init__()
        self.encoder = student.fused()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.encoder(normalize(image))


def pad_with_mean_colour(pixels: np.ndarray, size: int) -> torch.Tensor:
    """Resized RGB uint8 (h, w, 3) → float32 (1, 3, size, size), what an exported encoder takes."""
    height, width = pixels.shape[:2]
    padded = torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1).repeat(1, 1, size, size)
    padded[0, :, :height, :width] = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))
    return padded


def parity_pictures(recipe: Recipe, size: int) -> list[np.ndarray]:
    """Resized pictures RGB uint8 (h, w, 3) to compare on: held-out ones of the recipe's cache, or generated scenes
    where there is no finished cache of this size."""
    directory = Path(recipe.cache.dir)
    info = read_info(directory)
    if info is not None and is_complete(directory, info) and info.identity.image_size == size:
        cache = EmbeddingsCache(directory)
        _, held_out = cache.split(min(recipe.data.val_images, len(cache) - 1))
        return [cache[index].pixels() for index in held_out[:PICTURES]]
    scenes = (generate_scene(np.random.default_rng(seed), size)[0] for seed in range(PICTURES))
    return [resize_longest_side(scene, size) for scene in scenes]


@torch.no_grad()
def reference_embedding(student: StudentEncoder, pixels: np.ndarray) -> np.ndarray:
    """What the student itself makes of a resized picture, along the path that it was trained on; (1, C, h, w)."""
    padded = pad_pixels(pixels, student.img_size)[None]
    return student(to_encoder_input(padded, torch.tensor([pixels.shape[:2]]))).numpy()
