import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from distill.evaluate import saliency
from distill.evaluate.decoding import Segmenter
from distill.evaluate.everything import BoundedMaskGenerator
from distill.evaluate.saliency import dice, find, measure, summarize
from distill.evaluate.suite import evaluate_task
from distill.recipe import Recipe, load_recipe
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.teacher.loading import load_teacher
from students import InputError

SIZE, SCENE = 192, 4
"""Pixels, and a scene in which the toy finds something there with segment-anything's defaults."""


@pytest.fixture
def duts(tmp_path: Path) -> Path:
    """Two scenes in DUTS's layout, of each its first part salient."""
    for number in (SCENE, SCENE + 1):
        image, parts = generate_scene(np.random.default_rng(number), 200)
        write(tmp_path, f"ILSVRC_{number}", image, parts[0] * np.uint8(255))
    return tmp_path


def write(root: Path, name: str, image: np.ndarray, truth: np.ndarray) -> None:
    for kind, pixels, suffix in (("Image", image, "jpg"), ("Mask", truth, "png")):
        folder = root / "DUTS-TE" / f"DUTS-TE-{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{name}.{suffix}", quality=95)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def recipe_for(data: Path) -> Recipe:
    what = ("recipe=quickstart", "stage=evaluate", "evaluate.task=saliency", "checkpoint=teacher")
    return load_recipe([*what, f"image_size={SIZE}", f"evaluate.data={data}", f"run_dir={data / 'run'}"])


Chosen = tuple[np.ndarray, np.ndarray, list[np.ndarray], dict[str, Any]]


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Chosen:
    """What is written of a scene; its truth, which is not all black and white; all masks; and the result."""
    folder, sam = tmp_path_factory.mktemp("duts"), load_teacher("toy", None, SIZE)
    image = generate_scene(np.random.default_rng(SCENE), 200)[0]
    write(folder, "scene", image, image[..., 0])
    pixels = read(folder / "DUTS-TE" / "DUTS-TE-Image" / "scene.jpg")
    masks = [each["segmentation"] for each in BoundedMaskGenerator(sam).generate(pixels)]
    truth = masks[-1] * np.uint8(255)  # not of the first, which would be taken if none were compared
    truth[::2][masks[-1][::2]] = 129
    truth[:4], truth[4:8] = 128, 200
    Image.fromarray(truth).save(folder / "DUTS-TE" / "DUTS-TE-Mask" / "scene.png")
    recipe = recipe_for(folder)
    result = measure(find(recipe)[0], Segmenter(sam, torch.device("cpu")), recipe, folder / "pictures")
    return read(folder / "pictures" / "scene.png"), truth, masks, result


def test_the_best_of_all_masks_is_compared(chosen: Chosen) -> None:
    written, truth, masks, result = chosen
    salient = truth > 128
    scores = [2 * (mask & salient).sum() / (mask.sum() + salient.sum()) for mask in masks]
    assert int(np.argmax(scores)) > 0
    best = masks[int(np.argmax(scores))]
    assert result == {"mae": (best ^ salient).mean(), "dice": max(scores), "masks": len(masks)}
    assert 0 < result["mae"] < 1
    assert np.array_equal(written, best * np.uint8(255))


def test_errors_are_pysodmetrics(chosen: Chosen) -> None:
    theirs = pytest.importorskip("py_sod_metrics").MAE()
    written, truth, _, result = chosen
    theirs.step(pred=written, gt=truth)
    assert result["mae"] == theirs.get_results()["mae"]


def test_dice_by_hand() -> None:
    mask, truth = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    mask[0], truth[0, :2], truth[1, 0] = True, True, True
    assert dice(mask, truth) == 2 * 2 / (4 + 3)
    assert dice(truth, truth) == 1
    assert dice(mask, ~mask) == 0
    assert dice(mask, np.zeros((2, 4), bool)) == 0
    assert dice(np.zeros((2, 4), bool), np.zeros((2, 4), bool)) == 0


def test_an_image_without_masks_is_as_wrong_as_can_be(tmp_path: Path) -> None:
    """Nothing is stable on a single grey."""
    write(tmp_path, "flat", np.full((80, 100, 3), 128, np.uint8), np.eye(80, 100, dtype=np.uint8) * 255)
    recipe, segmenter = recipe_for(tmp_path), Segmenter(load_teacher("toy", None, SIZE), torch.device("cpu"))
    result = measure(find(recipe)[0], segmenter, recipe, tmp_path / "pictures")
    assert result == {"mae": 1.0, "dice": 0.0, "masks": 0}
    assert not (tmp_path / "pictures").exists()
    assert summarize({"a": result, "b": {"mae": 0.25, "dice": 0.5, "masks": 3}}, recipe) == {"MAE": 0.625, "empty": 0.5}


def test_a_mask_of_another_image_is_skipped(duts: Path, accelerator: Accelerator) -> None:
    other = f"ILSVRC_{SCENE + 1}"
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(duts / "DUTS-TE" / "DUTS-TE-Mask" / f"{other}.png")
    evaluate_task(recipe_for(duts), accelerator)
    section = json.loads((duts / "run" / "evaluation.json").read_text())["saliency"]
    numbers = section["results"]["teacher"]
    assert section["columns"] == list(saliency.COLUMNS)
    assert (numbers["images"], numbers["empty"]) == (1, 0)
    assert 0 < numbers["MAE"] < 1
    assert list(numbers["skipped"]) == [other]
    assert numbers["skipped"][other].startswith(f"{other}.png is not of an image of ")


def test_the_layout_is_looked_for(duts: Path) -> None:
    assert [item.key for item in find(recipe_for(duts))] == [f"ILSVRC_{SCENE}", f"ILSVRC_{SCENE + 1}"]
    assert find(recipe_for(duts)) == find(recipe_for(duts / "DUTS-TE"))
    masks = duts / "DUTS-TE" / "DUTS-TE-Mask"
    (masks / f"ILSVRC_{SCENE}.png").unlink()
    with pytest.raises(InputError, match=rf"DUTS-TE-Mask has no ILSVRC_{SCENE}\.png, nor the files of 0 other images"):
        find(recipe_for(duts))
    with pytest.raises(InputError, match=r"evaluate\.data=.*DUTS-TE-Mask is not laid out as DUTS: DUTS-TE-Image/"):
        find(recipe_for(masks))
