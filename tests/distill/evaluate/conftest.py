"""Scenes as BSDS500 lays its photographs out, and a student to evaluate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from embeddings_cache.images import bounding_box, encode_rle
from embeddings_cache.images.scenes import generate_scene
from support import Layout


def boundaries_of(masks: list[np.ndarray]) -> np.ndarray:
    """Where neighbouring pixels belong to different masks: uint8 (H, W)."""
    labels = np.zeros(masks[0].shape, int)
    for number, mask in enumerate(masks, start=1):
        labels[mask] = number
    edges = np.zeros(labels.shape, np.uint8)
    edges[:-1] |= labels[:-1] != labels[1:]
    edges[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    return edges


@pytest.fixture(scope="session")
def student(finished_run: Path) -> Path:
    """The student of the shared run, at 128 px."""
    return finished_run / "run" / "student.safetensors"


@pytest.fixture
def bsds(tmp_path: Path) -> Layout:
    """Write scenes as BSDS500 is laid out, within some folder of it; two people draw each."""

    def write(count: int = 3, within: str = "BSDS500/data", root: Path = tmp_path / "bsds") -> Path:
        images, truths = root / within / "images" / "test", root / within / "groundTruth" / "test"
        images.mkdir(parents=True)
        truths.mkdir(parents=True)
        for number in range(count):
            picture, masks = generate_scene(np.random.default_rng(number), longest_side=160)
            Image.fromarray(picture).save(images / f"{number}.png")
            people = np.empty((1, 2), dtype=object)
            for person, seen in enumerate((masks, masks[:2])):
                record = np.zeros((1, 1), dtype=[("Segmentation", "O"), ("Boundaries", "O")])
                record["Boundaries"][0, 0] = boundaries_of(seen)
                record["Segmentation"][0, 0] = np.zeros(picture.shape[:2], np.uint16)
                people[0, person] = record
            savemat(truths / f"{number}.mat", {"groundTruth": people})
        return root

    return write


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Write scenes as COCO is laid out, with exact boxes as a detector's results."""

    def write(count: int = 3, root: Path = tmp_path / "coco") -> tuple[Path, Path]:
        (root / "val2017").mkdir(parents=True)
        (root / "annotations").mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        boxes: list[dict[str, Any]] = []
        for number in range(count):
            generator = np.random.default_rng(number)
            picture, masks = generate_scene(generator, longest_side=160)
            Image.fromarray(picture).save(root / "val2017" / f"{number:012d}.png")
            height, width = picture.shape[:2]
            id = 100 + number
            images.append({"id": id, "file_name": f"{number:012d}.png", "height": height, "width": width})
            for mask in masks:
                x0, y0, x1, y1 = bounding_box(mask)
                entry = {"image_id": id, "category_id": 1 + len(annotations) % 2, "bbox": [x0, y0, x1 - x0, y1 - y0]}
                shape = {"segmentation": encode_rle(mask), "area": int(mask.sum()), "iscrowd": 0}
                annotations.append({"id": len(annotations) + 1, **entry, **shape})
                boxes.append({**entry, "score": float(generator.uniform(0.2, 1))})
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1}, {"id": 2}]}
        (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
        (root / "boxes.json").write_text(json.dumps(boxes))
        return root, root / "boxes.json"

    return write
