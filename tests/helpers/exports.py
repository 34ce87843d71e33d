"""Small students and what PyTorch makes of some pictures, for the tests of exports."""

import json
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
from segment_anything.modeling import Sam
from torch import nn
from torch.nn.functional import mse_loss

from distill.export.encoder import RgbEncoder
from distill.export.onnx import encoder_model
from distill.export.proof import Reference
from distill.recipe import Recipe, load_recipe
from distill.schema import NEWEST_OPSET
from embeddings_cache.images.preprocessing import pad_pixels, resize_longest_side, to_encoder_input
from embeddings_cache.images.scenes import generate_scene, sa1b_annotation
from embeddings_cache.shards.codec import CacheRow, encode_pixels
from embeddings_cache.teacher.loading import load_teacher
from students import StudentEncoder, create_student
from support import TINY, places

SIZE = 128
SMALL = {
    "repvit_m0_9": {"widths": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "tiny_vit_5m": {"widths": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
}


def small_student(name: str = "repvit_m0_9", downsample: str = "stride1", image_size: int = SIZE) -> StudentEncoder:
    """A student that has learnt the first scenes by heart, in seconds: drawn weights make empty masks."""
    return deepcopy(_learnt(name, downsample, image_size))


@cache
def _learnt(name: str, downsample: str, image_size: int) -> StudentEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = create_student(name, image_size, 128, downsample=downsample, **SMALL[name])
    rows = [scene_row(seed, image_size) for seed in range(4)]
    pixels = torch.stack([pad_pixels(row.pixels(), image_size) for row in rows])
    images = to_encoder_input(pixels, torch.tensor([row.input_size for row in rows]))
    with torch.no_grad():
        embeddings = toy(image_size).image_encoder(images)
    optimizer = torch.optim.Adam(student.train().parameters(), 3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        mse_loss(student(images), embeddings).backward()
        optimizer.step()
    return student.eval().requires_grad_(False)


@cache
def toy(size: int = SIZE) -> Sam:
    return load_teacher("toy", None, size)


def scene_row(seed: int, size: int = SIZE) -> CacheRow:
    """A scene with its annotation, as a cache would hold it."""
    scene, masks = generate_scene(np.random.default_rng(seed), size)
    pixels = resize_longest_side(scene, size)
    annotation = json.dumps(sa1b_annotation(seed, scene, masks))
    return CacheRow(
        f"sa_{seed}", np.empty(0), encode_pixels(pixels, "png"), scene.shape[:2], pixels.shape[:2], annotation
    )


@cache
def reference_of(name: str = "repvit_m0_9", downsample: str = "stride1") -> Reference:
    """What PyTorch makes of some scenes with a small student."""
    return reference(small_student(name, downsample))


@cache
def onnx_of(name: str = "repvit_m0_9", downsample: str = "stride1", opset: int = NEWEST_OPSET) -> onnx.ModelProto:
    """A small student as an ONNX model; not to be changed."""
    return encoder_model(RgbEncoder(small_student(name, downsample)).eval(), opset=opset)


def reference(encoder: nn.Module, images: int = 2) -> Reference:
    """What PyTorch makes of some scenes, with the toy teacher's decoder."""
    found = Reference(encoder, toy(encoder.img_size), [scene_row(seed, encoder.img_size) for seed in range(images)])
    assert np.mean([mask.any() for masks in found.masks for mask in masks]) > 0.5, "masks that prove nothing"
    return found


def export_recipe(directory: Path, checkpoint: Path, *arguments: str) -> Recipe:
    """Of a checkpoint, with results and cache below a directory."""
    return load_recipe([*TINY, *places(directory, "gone.tar"), "stage=export", f"checkpoint={checkpoint}", *arguments])
