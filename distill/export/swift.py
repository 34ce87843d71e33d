"""`swift/`, which comes with Core ML packages: a Swift package that uses them, with an example, and what PyTorch makes
of it, for its tests on a Mac."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from distill.clients import write_client
from distill.export.files import digest, size, whole_directory
from distill.export.prompts import Prompt, place_embedding, predicted, prompts_of
from distill.export.proof import Reference
from distill.export.subject import Subject
from embeddings_cache.images import generate_scene, resize_longest_side, resized_shape, sa1b_annotation
from embeddings_cache.shards import CacheRow, encode_pixels
from embeddings_cache.system import write_json

FOLDER = "swift"
EXAMPLE = "Tests/SegmentAnythingTests/Example"
"""Within it."""

EXAMPLE_SEED, EXAMPLE_SIDE = (26, 4), 640
"""Scenes to learn from have a first number of 0, unless a recipe says otherwise: this one is not among them."""

CLEAR = 0.05
"""By how much a decoder prefers one mask of an ambiguous click, so that float16 does not prefer another."""


def packages_of(names: Iterable[str]) -> tuple[str, str] | None:
    """The encoder and decoder among the files of an export that the Swift package takes by itself, the shortest names;
    None where one is missing."""
    ordered = sorted(names, key=lambda name: (len(name), name))
    kinds = (re.compile(rf"{kind}(_\w+)?\.mlpackage$") for kind in ("Encoder", "Decoder"))
    encoder, decoder = (next(filter(kind.search, ordered), None) for kind in kinds)
    return (encoder, decoder) if encoder and decoder else None


def write_swift(path: Path, subject: Subject, packages: tuple[str, str]) -> dict[str, Any]:
    """Write the package, whole or not at all; returns what the manifest says of it.

    Args:
        path: of the folder.
        subject: with a decoder.
        packages: names of the encoder's and the decoder's.
    """
    assert subject.sam is not None
    encoder, decoder = (name.removesuffix(".mlpackage") for name in packages)
    facts: dict[str, str | int] = {"title": subject.name, "encoder": encoder, "decoder": decoder}
    scene, masks = generate_scene(np.random.default_rng(EXAMPLE_SEED), EXAMPLE_SIDE)
    answers = list(_answers(subject, subject.sam, scene, json.dumps(sa1b_annotation(0, scene, masks))))
    with whole_directory(path) as folder:
        folder.mkdir()
        write_client(FOLDER, folder, {**facts, "size": subject.image_size})
        example = folder / EXAMPLE
        example.mkdir()
        Image.fromarray(scene).save(example / "example.png")
        write_json(example / "expected.json", answers)
        contents = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return {"format": "folder", "sha256": digest(path), "bytes": size(path), "contents": contents}


def _answers(subject: Subject, sam: Sam, scene: np.ndarray, annotation: str) -> Iterator[dict[str, Any]]:
    """What `SamPredictor` makes of some prompts on a scene: masks as lengths of runs."""
    shape: tuple[int, int] = (scene.shape[0], scene.shape[1])
    pixels = resize_longest_side(scene, int(subject.encoder.img_size))  # type: ignore[arg-type]
    resized = resized_shape(shape, subject.image_size)
    row = CacheRow("example", np.empty(0), encode_pixels(pixels, "png"), shape, resized, annotation)
    predictor = SamPredictor(sam)
    place_embedding(predictor, Reference(subject.encoder, sam, [row]).embeddings[0], row)
    for prompt in prompts_of(row):
        if _is_clear(predictor, prompt):
            logits, ious, _ = predicted(predictor, prompt, single=True)
            yield {
                "points": np.asarray(prompt.get("point_coords", [])).tolist(),
                "labels": [int(label) for label in prompt.get("point_labels", [])],
                "box": np.asarray(prompt.get("box", [])).tolist(),
                "predicted_iou": float(ious[0, 0]),
                "runs": run_lengths(logits[0, 0] > 0),
            }


def _is_clear(predictor: SamPredictor, prompt: Prompt) -> bool:
    if "box" in prompt or len(prompt["point_coords"]) > 1:
        return True
    best, second = np.sort(predicted(predictor, prompt, single=False)[1][0, 1:])[:-3:-1]
    return bool(best - second > CLEAR)


def run_lengths(mask: np.ndarray) -> list[int]:
    """Boolean (H, W) → how many pixels are off, on, off, …, row by row; the first may be 0."""
    flat = np.concatenate([[False], mask.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
