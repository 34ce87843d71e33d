from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import binary_dilation, correlate
from scipy.special import expit

from distill.evaluate.boundaries import count_boundaries
from distill.evaluate.decoding import Segmenter
from distill.evaluate.edges import edge_map, find, measure, outlines, read_boundaries, summarize
from distill.recipe import Recipe, load_recipe
from embeddings_cache.teacher import load_teacher
from students import InputError
from support import Layout


def recipe_of(data: Path, *more: str) -> Recipe:
    tiny = ["recipe=quickstart", "image_size=128", "stage=evaluate", "evaluate.task=edges"]
    return load_recipe([*tiny, f"evaluate.data={data}", *more])


@pytest.fixture(scope="module")
def teacher() -> Segmenter:
    return Segmenter(load_teacher("toy", None, 128), torch.device("cpu"))


def test_outlines_are_sobels_just_outside_of_each_mask() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (5, 24, 31))).float()
    logits[0], logits[1] = -1.0, 1.0  # nothing, and everything: neither has an outside to draw
    pixels, magnitude = outlines(logits, 0.0)
    found = torch.zeros(24 * 31).scatter_reduce_(0, pixels, magnitude, "amax").reshape(24, 31).numpy()
    kernel, expected = np.outer([1, 2, 1], [-1, 0, 1]), np.zeros((24, 31))
    for mask_logits in logits.numpy().astype(float):
        mask, probability = mask_logits > 0, expit(mask_logits)
        sobel = np.hypot(*(correlate(probability, weights, mode="nearest") for weights in (kernel, kernel.T)))
        outside = binary_dilation(mask, np.ones((3, 3))) & ~mask
        expected = np.maximum(expected, sobel * outside)
    assert np.allclose(found, expected, atol=1e-5)


def test_an_edge_map_follows_what_is_there(bsds: Layout, teacher: Segmenter, tmp_path: Path) -> None:
    recipe = recipe_of(bsds(2), "evaluate.thresholds=9")
    results = {item.key: measure(item, teacher, recipe, tmp_path / "maps") for item in find(recipe)}
    numbers = summarize(results, recipe)
    shifted = []
    for item in find(recipe):
        levels = np.asarray(Image.open(tmp_path / "maps" / f"{item.key}.png"))
        assert levels.dtype == np.uint8
        counts = count_boundaries(levels / 255, read_boundaries(item.truth), np.linspace(0.1, 0.9, 9))
        assert counts.right.tolist() == results[item.key]["right"]  # what is kept as a picture is what was counted
        away = np.roll(levels, (25, 25), (0, 1)) / 255
        shifted.append(count_boundaries(away, read_boundaries(item.truth), np.linspace(0.1, 0.9, 9)).f.max())
    assert numbers["ODS"] > 0.3
    assert numbers["ODS"] > 1.5 * np.mean(shifted)


def test_an_edge_map_is_within_one(teacher: Segmenter) -> None:
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    edges = edge_map(teacher.look(image))
    assert edges.shape == (90, 120)
    assert edges.min() >= 0
    assert 0.5 < edges.max() <= 1


@pytest.mark.parametrize("within", ["", "data", "BSDS500/data"])
def test_bsds_is_found_wherever_it_was_unpacked(bsds: Layout, within: str) -> None:
    recipe = recipe_of(bsds(2, within))
    assert [(item.key, item.image.name, item.truth.name) for item in find(recipe)] == [
        ("0", "0.png", "0.mat"),
        ("1", "1.png", "1.mat"),
    ]


def test_what_is_not_bsds_is_refused(bsds: Layout, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not laid out as BSDS500: images/test/"):
        find(recipe_of(tmp_path))
    root = bsds(3)
    (root / "BSDS500/data/groundTruth/test/1.mat").unlink()
    with pytest.raises(InputError, match=r"has no 1\.mat"):
        find(recipe_of(root))


def test_a_bad_pair_is_named(bsds: Layout, teacher: Segmenter, tmp_path: Path) -> None:
    recipe = recipe_of(bsds(3))
    other, garbage, gone = find(recipe)
    Image.new("RGB", (50, 40)).save(other.image)
    garbage.truth.write_bytes(b"MATLAB 5.0 MAT-file, or so it says")
    gone.image.unlink()
    said_of = {"0.mat is not of an image of 50×40 px": other, "1.mat has no boundaries": garbage, "no such file": gone}
    for said, item in said_of.items():
        with pytest.raises(InputError, match=said):
            measure(item, teacher, recipe, tmp_path)
