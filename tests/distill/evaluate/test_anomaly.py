import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from segment_anything import SamPredictor
from sklearn.metrics import precision_recall_curve

from distill.evaluate.anomaly import SIDE, anomaly_map, best_f1, find, measure, nearest, settings, summarize
from distill.evaluate.decoding import Segmenter
from distill.evaluate.suite import evaluate_task
from distill.recipe import Recipe, load_recipe
from embeddings_cache.images import bounding_box, decode_rle, encode_rle
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.teacher.loading import load_teacher
from students import InputError

BROKEN, GOOD, CUT = "bottle/test/broken/000.png", "bottle/test/good/000.png", "zipper/test/cut/007.png"


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    """Three scenes in MVTec-AD's layout, the last part of each a defect, with boxes around all parts but of the good
    one, and one box more than count."""
    boxes = {}
    for number, name in enumerate((BROKEN, GOOD, CUT)):
        image, parts = generate_scene(np.random.default_rng(number), 160)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        if name == GOOD:
            continue
        drawn = tmp_path / name.replace("/test/", "/ground_truth/").replace(".png", "_mask.png")
        drawn.parent.mkdir(parents=True)
        Image.fromarray(parts[-1] * np.uint8(255)).save(drawn)
        around = [list(bounding_box(part)) for part in (parts * 6)[:6]]
        boxes[name] = {"boxes": around, "scores": [0.3, 0.9, 0.1, 0.5, 0.4, 0.2]}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    return tmp_path


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(load_teacher("toy", None, 128), torch.device("cpu"))


def recipe_for(data: Path, boxes: Path | None = None) -> Recipe:
    what = ["recipe=quickstart", "image_size=128", "stage=evaluate", "evaluate.task=anomaly", "checkpoint=teacher"]
    return load_recipe(
        [*what, f"evaluate.data={data}", f"evaluate.boxes={boxes or data / 'boxes.json'}", f"run_dir={data / 'run'}"]
    )


def say(data: Path, name: str, boxes: Any, scores: Any) -> Recipe:
    """A recipe with boxes of one image alone."""
    (data / "some.json").write_text(json.dumps({name: {"boxes": boxes, "scores": scores}}))
    return recipe_for(data, data / "some.json")


def test_masks_are_the_predictors_of_the_best_five_boxes(mvtec: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    recipe, predictor = recipe_for(mvtec), SamPredictor(segmenter.sam)
    items = find(recipe)
    assert [item.key for item in items] == ["bottle/broken/000", "bottle/good/000", "zipper/cut/007"]
    said = json.loads((mvtec / "boxes.json").read_text())
    for item, name in zip(items, (BROKEN, GOOD, CUT), strict=True):
        result = measure(item, segmenter, recipe, tmp_path)
        if name == GOOD:
            assert (result["masks"], result["scores"]) == ([], [])
            assert not decode_rle(result["truth"]).any()
            continue
        assert result["scores"] == [0.9, 0.5, 0.4, 0.3, 0.2]
        with Image.open(item.image) as image, Image.open(str(item.truth)) as truth:
            predictor.set_image(np.asarray(image))
            drawn = cv2.resize(np.asarray(truth), (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
        assert np.array_equal(decode_rle(result["truth"]), drawn > 0)
        for place, rle in zip((1, 3, 4, 0, 5), result["masks"], strict=True):
            (mask,), _, _ = predictor.predict(box=np.array(said[name]["boxes"][place]), multimask_output=False)
            expected = cv2.resize(mask.astype(np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
            assert np.array_equal(decode_rle(rle), expected > 0)
        assert len(json.dumps(result)) < 20_000


@pytest.mark.parametrize("shape", [(1024, 1024), (700, 840), (900, 1000), (133, 160), (1, 7), (399, 401)])
def test_the_nearest_pixel_is_opencvs(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random(shape) < 0.5
    expected = cv2.resize(mask.astype(np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(nearest(mask), expected > 0)


def test_a_box_that_juts_out_is_clipped_and_others_left_out(mvtec: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    with Image.open(mvtec / BROKEN) as image:
        width, height = image.size
    results = []
    for box in ([-50, 20, 90, height + 70], [0, 20, 90, height], [0, 20, 60, height]):
        recipe = say(mvtec, BROKEN, [box], [0.5])
        results.append(measure(find(recipe)[0], segmenter, recipe, tmp_path)["masks"])
    assert results[0] == results[1] != results[2]
    for outside in ([width, 5, width + 9, 9], [5, 9, 9, 9], [9, 5, 5, 9]):
        recipe = say(mvtec, BROKEN, [outside, [0, 20, 90, height]], [0.9, 0.5])
        result = measure(find(recipe)[0], segmenter, recipe, tmp_path)
        assert (result["masks"], result["scores"], result["left_out"]) == (results[1], [0.5], 1)


def rows(*which: slice) -> list[dict[str, Any]]:
    """RLEs of masks that cover some rows each."""
    masks = np.zeros((len(which), SIDE, SIDE), bool)
    for mask, some in zip(masks, which, strict=True):
        mask[some] = True
    return [encode_rle(mask) for mask in masks]


def test_maps_by_hand() -> None:
    values = anomaly_map(rows(slice(0, 200), slice(100, 300)), [0.8, 0.4])
    expected = np.repeat([0.8 / 2, 1.2 / 3, 0.4 / 2, 0], 100)
    assert values == pytest.approx(np.tile(expected[:, None], (1, SIDE)), abs=1e-15)
    assert not anomaly_map([], []).any()


def test_f1_by_hand() -> None:
    """Of 400 rows: 125 are a defect, of which one mask has 100, and another of half its score 25 and 25 good ones."""
    (found, other), (truth, none) = rows(slice(0, 100), slice(100, 150)), rows(slice(0, 125), slice(0, 0))
    results = {
        "bottle/broken/000": {"masks": [found, other], "scores": [0.9, 0.4], "truth": truth, "left_out": 0},
        "bottle/good/000": {"masks": [found], "scores": [0.3], "truth": none, "left_out": 3},
        "zipper/cut/007": {"masks": [], "scores": [], "truth": truth, "left_out": 0},
        "screw/good/000": {"masks": [found], "scores": [0.7], "truth": none, "left_out": 1},
    }
    recipe = load_recipe(["recipe=quickstart"])
    # Levels are 0.45, 0.2, 0.15 and 0: from 0.45 on F1 is 200/225, from 0.15 on, where the good image's begin, 250/375.
    bottle, zipper = 2 * 125 / (150 + 125), 2 * 125 / (400 + 125)
    assert summarize(results, recipe) == {
        "F1": pytest.approx((bottle + zipper) / 2),
        "classes": {
            "bottle": {"images": 2, "F1": pytest.approx(bottle)},
            "zipper": {"images": 1, "F1": pytest.approx(zipper)},
            "screw": {"images": 1, "F1": None},
        },
        "boxes_left_out": 4,
        "note": "1 without boxes",
    }
    results["bottle/good/000"]["scores"] = [0.95]  # what is good comes before what is not
    assert summarize(results, recipe)["classes"]["bottle"]["F1"] == pytest.approx(2 * 125 / (250 + 125))
    assert summarize({"screw/good/000": results["screw/good/000"]}, recipe)["F1"] is None


def test_f1_is_scikit_learns() -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        images = [
            (np.round(rng.random((20, 30)) + 0.3 * (truth := rng.random((20, 30)) < 0.1), 1 + seed), truth)
            for _ in range(4)
        ]
        images.append((np.zeros((20, 30)), np.zeros((20, 30), bool)))
        values, truths = (np.concatenate([part.ravel() for part in parts]) for parts in zip(*images, strict=True))
        precision, recall, _ = precision_recall_curve(truths, values)
        expected = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
        assert best_f1(images) == pytest.approx(expected, rel=1e-12)
        # As SAA+ brings maps to [0, 1].
        assert best_f1([((map_ - values.min()) / np.ptp(values), truth) for map_, truth in images]) == best_f1(images)


def test_a_class_is_a_number(mvtec: Path, accelerator: Accelerator) -> None:
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(mvtec / "zipper/ground_truth/cut/007_mask.png")
    evaluate_task(recipe_for(mvtec), accelerator)
    section = json.loads((mvtec / "run" / "evaluation.json").read_text())["anomaly"]
    numbers = section["results"]["teacher"]
    assert numbers["classes"] == {"bottle": {"images": 2, "F1": numbers["F1"]}}
    assert 0 < numbers["F1"] < 1
    (reason,) = numbers["skipped"].values()
    assert reason.startswith("zipper/cut/007: its mask is not of an image of ")


def test_other_boxes_are_other_settings(mvtec: Path) -> None:
    before = settings(recipe_for(mvtec))
    (mvtec / "other.json").write_bytes((mvtec / "boxes.json").read_bytes())
    assert settings(recipe_for(mvtec, mvtec / "other.json")) == before
    (mvtec / "boxes.json").write_text((mvtec / "boxes.json").read_text().replace("0.9", "0.8"))
    assert settings(recipe_for(mvtec)) != before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"boxes\.json is not valid JSON"),
        ("[1]", r"boxes\.json has no boxes by image, but a list"),
        ('{"a.png": {"boxes": [[1, 2, 3, 4]]}}', r"boxes\.json: a\.png has no boxes and a score for each: KeyError"),
        ('{"a.png": {"boxes": [[1, 2, 3]], "scores": [1]}}', r"a\.png has no boxes and a score for each: ValueError"),
        ('{"a.png": {"boxes": [[1, 2, 3, 4]], "scores": [NaN]}}', r"a\.png has numbers that are not finite"),
        ('{"a.png": {"boxes": [], "scores": []}}', r"boxes\.json is not of .*, which has no a\.png"),
    ],
)
def test_other_files_than_boxes_are_refused(content: str, said: str, mvtec: Path) -> None:
    (mvtec / "boxes.json").write_text(content)
    with pytest.raises(InputError, match=said):
        find(recipe_for(mvtec))


def test_what_is_missing_is_named(mvtec: Path) -> None:
    with pytest.raises(InputError, match=r"evaluate\.boxes=.*none\.json: no such file"):
        find(recipe_for(mvtec, mvtec / "none.json"))
    recipe = recipe_for(mvtec)
    recipe.evaluate.boxes = None
    with pytest.raises(InputError, match=r"takes a detector's boxes: evaluate\.boxes=FILE\.json"):
        find(recipe)
    (mvtec / "zipper/ground_truth/cut/007_mask.png").unlink()
    with pytest.raises(InputError, match=r"there is no .*cut/007_mask\.png, nor the masks of 0 other images"):
        find(recipe_for(mvtec))
    with pytest.raises(InputError, match=r"bottle is not laid out as MVTec-AD: CLASS/test/DEFECT/\*\.png"):
        find(recipe_for(mvtec / "bottle", mvtec / "boxes.json"))
