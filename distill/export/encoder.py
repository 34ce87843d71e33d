"""The encoder as other runtimes get it, and the pictures that prove an export."""

import json
from copy import deepcopy
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import nn
from torch.nn.functional import conv2d, layer_norm, pad, pixel_shuffle

from distill.evaluate.masks import make_prompts
from distill.export.proof import PROMPTS
from distill.recipe import Recipe
from embeddings_cache.images import PIXEL_MEAN, generate_scene, normalize, resize_longest_side, sa1b_annotation
from embeddings_cache.shards import CacheRow, EmbeddingsCache, encode_pixels, is_complete, read_info
from students import InputError, StudentEncoder

CALIBRATION_SEED = 1
"""Of scenes to calibrate on, so that they are not those to compare on."""


class RgbEncoder(nn.Module):
    """An encoder with the normalisation inside: RGB 0–255 float32 (B, 3, S, S) → embedding (B, C, S/16, S/16).

    Padding has to be the mean colour, which normalises to 0. A student's branches are fused.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        fused = encoder.fused() if isinstance(encoder, StudentEncoder) else deepcopy(encoder)
        self.encoder = for_runtimes(fused)
        self.image_size = int(encoder.img_size)  # type: ignore[arg-type]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.encoder(normalize(image))


class ChannelNorm(nn.Module):
    """segment-anything's `LayerNorm2d`, (B, C, h, w) → (B, C, h, w), by PyTorch's layer norm.

    Spelled out as a mean of squares it overflows in float16 where an activation is beyond 255; the operator computes
    its statistics in float32.
    """

    def __init__(self, norm: LayerNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = x.permute(0, 2, 3, 1)
        return layer_norm(last, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class BicubicDoubling(nn.Module):
    """PyTorch's bicubic interpolation by a factor of 2 as a convolution, which every runtime has.

    Output pixels lie a quarter of a pixel left and right of an input pixel, so that there are two sets of weights along
    each axis: Keys' cubic convolution with a = −0.75 ("Cubic convolution interpolation for digital image processing",
    1981), over the four pixels around; the border is repeated.
    """

    kernels: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        before = torch.tensor([*_cubic(0.75), 0.0], dtype=torch.float64)
        after = before.flip(0)
        kernels = [torch.outer(y, x) for y in (before, after) for x in (before, after)]
        self.register_buffer("kernels", torch.stack(kernels)[:, None].float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) → (B, C, 2h, 2w)."""
        channels = x.shape[1]
        phases = conv2d(pad(x, (2, 2, 2, 2), mode="replicate"), self.kernels.repeat(channels, 1, 1, 1), groups=channels)
        return pixel_shuffle(phases, 2)


def for_runtimes(module: nn.Module) -> nn.Module:
    """Replace, in place, what other runtimes lack or compute less well by what comes to the same."""
    for name, child in module.named_children():
        if isinstance(child, LayerNorm2d):
            setattr(module, name, ChannelNorm(child))
        elif isinstance(child, nn.Upsample) and (child.mode, child.scale_factor) == ("bicubic", 2.0):
            setattr(module, name, BicubicDoubling())
        else:
            for_runtimes(child)
    return module


def pad_with_mean_colour(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resized RGB uint8 (h, w, 3) → float32 (1, 3, size, size), what an exported encoder takes."""
    height, width = pixels.shape[:2]
    padded = np.empty((1, 3, size, size), dtype=np.float32)
    padded[:] = np.array(PIXEL_MEAN, dtype=np.float32)[:, None, None]
    padded[0, :, :height, :width] = pixels.transpose(2, 0, 1)
    return padded


def validation_rows(recipe: Recipe, size: int) -> tuple[list[CacheRow], str]:
    """Images to compare on, and where they come from: `export.images` held-out ones of the recipe's cache whose
    annotations can be decoded, or generated scenes where there is no finished cache of this size."""
    cache = _cache(recipe, size)
    if cache is None:
        return [_scene_row(size, seed) for seed in range(recipe.export.images)], "generated scenes"
    _, held_out = cache.split(min(recipe.data.val_images, len(cache) - 1))
    rows = (row for row in (cache[index] for index in held_out) if _has_prompts(row))
    found = list(islice(rows, recipe.export.images))
    if not found:
        raise InputError(f"{recipe.cache.dir}: no held-out image has an annotation that can be decoded")
    return found, f"held-out images of {recipe.cache.dir}"


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


def _cubic(t: float, a: float = -0.75) -> list[float]:
    """Weights of the four pixels around a place that lies t behind the second."""

    def near(x: float) -> float:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1

    def far(x: float) -> float:
        return a * (x**3 - 5 * x**2 + 8 * x - 4)

    return [far(1 + t), near(t), near(1 - t), far(2 - t)]
