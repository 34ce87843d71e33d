"""How an export's encoders of few bits do on images that its gate did not see:

    python tests/helpers/unseen_masks.py RUN PHOTO...

prints mean and 5th percentile of their masks' IoUs with the student's in PyTorch, and the share below 0.9: of
each photograph nine points, and of 24 scenes that nothing has learnt from five points and five boxes.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from distill.export.coreml.encoder import coreml_encode
from distill.export.coreml.program import MilProgram
from distill.export.onnx.encoder import onnx_encode
from distill.export.proof import Encode, Reference
from distill.export.subject import load_subject
from distill.recipe import load_recipe
from embeddings_cache.images import decode_image, resize_longest_side
from embeddings_cache.images.scenes import generate_scene, sa1b_annotation
from embeddings_cache.shards import CacheRow, encode_pixels

SCENES, SEED = 24, 2600
"""Scenes to learn from have a pair of numbers for a seed: one number alone is none of theirs."""


def main() -> None:
    """Print a table of files by kinds of images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("photos", type=Path, nargs="*")
    asked = parser.parse_args()
    subject = load_subject(load_recipe(["stage=export", f"run_dir={asked.run}"]))
    rows = {
        "photographs": [row_of(decode_image(photo.read_bytes()), subject.image_size) for photo in asked.photos],
        "scenes": [scene(SEED + number, subject.image_size) for number in range(SCENES)],
    }
    print("| file | images | masks | mean | 5th percentile | below 0.9 |")
    print(f"|{' --- |' * 6}")
    for kind, images in rows.items():
        if not images:
            continue
        reference = Reference(subject.encoder, subject.sam, images, kind)
        for path in sorted((asked.run / "export").iterdir()):
            if encode := encoder_of(path, reference.image_size):
                found = reference.parity(encode)
                words = [
                    f"{found['mask_miou']:.3f}",
                    f"{found['mask_iou_p5']:.3f}",
                    f"{100 * found['masks_below_0.9']:.1f} %",
                ]
                print(
                    f"| `{path.name}` | {found['images']} {kind} | {found['masks']} | {' | '.join(words)} |", flush=True
                )


def encoder_of(path: Path, size: int) -> Encode | None:
    """What runs a file, if it is an encoder for any runtime that is here."""
    if path.name.startswith("encoder_") and path.suffix == ".onnx" and "trt" not in path.name:
        return onnx_encode(path)
    if "Encoder_" in path.name and path.suffix == ".mlpackage":
        return coreml_encode(MilProgram(path), size)
    return None


def row_of(pixels: np.ndarray, size: int, annotation: str | None = None) -> CacheRow:
    """A picture as a cache would hold it."""
    small = resize_longest_side(pixels, size)
    return CacheRow("unseen", np.empty(0), encode_pixels(small, "png"), pixels.shape[:2], small.shape[:2], annotation)


def scene(seed: int, size: int) -> CacheRow:
    """A generated one with its annotation."""
    pixels, masks = generate_scene(np.random.default_rng(seed), size)
    return row_of(pixels, size, json.dumps(sa1b_annotation(seed, pixels, masks)))


if __name__ == "__main__":
    main()
