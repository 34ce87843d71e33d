import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import Params
from segment_anything import SamPredictor

from distill.evaluate import compare
from distill.evaluate import masks as module
from distill.evaluate.compare import Score, compare_rows, embed_both, make_prompts, predict_masks, score_image
from distill.evaluate.ious import mask_iou
from distill.evaluate.masks import SIZES, evaluate_masks, evaluation_rows, load_sams, summarize
from distill.recipe import Recipe, load_recipe
from distill.report import report
from embeddings_cache.images.rle import encode_rle
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.teacher.loading import load_teacher
from students import InputError, build_student_sam
from support import TINY, places


@pytest.fixture
def recipe(finished_run: Path, scene_tar: Path) -> Recipe:
    return load_recipe([*TINY, *places(finished_run, scene_tar)])


@pytest.fixture
def elsewhere(recipe: Recipe, tmp_path: Path) -> Recipe:
    """The finished student, evaluated into another run directory."""
    student = Path(recipe.run_dir) / "student.safetensors"
    return replace(recipe, run_dir=str(tmp_path), checkpoint=str(student))


def result(recipe: Recipe) -> dict:
    return json.loads((Path(recipe.run_dir) / "evaluation.json").read_text())["masks"]


def test_masks_are_those_of_sam_predictor(recipe: Recipe) -> None:
    teacher = load_teacher("toy", None, 128)
    predictor = SamPredictor(teacher)
    for row in list(evaluation_rows(recipe, teacher))[:3]:
        prompts = make_prompts(row, recipe.evaluate)
        predictor.set_image(row.pixels())
        # The predictor has seen the resized picture; give it the original's size and the very same embedding.
        predictor.original_size, predictor.features = row.original_size, torch.from_numpy(row.embedding)[None].float()
        from_points = list(predict_masks(teacher, predictor.features, row, points=prompts.points))
        from_boxes = list(predict_masks(teacher, predictor.features, row, boxes=prompts.boxes))
        for number, point in enumerate(prompts.points):
            candidates, iou, _ = predictor.predict(point[None], np.array([1]), multimask_output=True)
            assert np.array_equal(from_points[number], candidates[iou.argmax()])
            single, _, _ = predictor.predict(box=prompts.boxes[number], multimask_output=False)
            assert np.array_equal(from_boxes[number], single[0])
        assert from_points[0].shape == row.original_size


def test_prompts_lie_in_their_masks(recipe: Recipe) -> None:
    for row in evaluation_rows(recipe, load_teacher("toy", None, 128)):
        prompts = make_prompts(row, recipe.evaluate)
        assert len(prompts.points) == len(prompts.boxes) == len(prompts.masks)
        for (x, y), (x0, y0, x1, y1), mask in zip(prompts.points, prompts.boxes, prompts.masks, strict=True):
            assert mask[int(y), int(x)]
            assert mask[int(y0) : int(y1), int(x0) : int(x1)].sum() == mask.sum()
        assert len(make_prompts(row, replace(recipe.evaluate, masks_per_image=2)).points) == 2


def test_iou_agrees_with_coco() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.random((2, 30, 40)) < 0.3
        rles = [dict(rle, counts=rle["counts"].encode()) for rle in (encode_rle(a), encode_rle(b))]
        assert mask_iou(a, b) == pytest.approx(coco_mask.iou(rles[:1], rles[1:], [0])[0, 0])
    empty = np.zeros((3, 3), bool)
    assert mask_iou(empty, empty) == 1.0
    assert mask_iou(empty, ~empty) == 0.0


def test_sizes_are_cocos() -> None:
    ranges = dict(zip(Params(iouType="segm").areaRngLbl, Params(iouType="segm").areaRng, strict=True))
    for name, (low, high) in SIZES.items():
        assert low == ranges[name][0]
        assert high == ranges[name][1] or name == "large"


def test_the_teacher_as_its_own_student_agrees_with_itself(recipe: Recipe) -> None:
    teacher = load_teacher("toy", None, 128)
    sam = build_student_sam(teacher.image_encoder, teacher)
    for row in list(evaluation_rows(recipe, teacher))[:2]:
        student, cached = embed_both(row, sam)
        assert (student - cached).abs().max() < 2e-3  # float16 in the cache
        scores = list(score_image(row, teacher, student, student, make_prompts(row, recipe.evaluate)))
        assert {score.student_teacher for score in scores} == {1.0}
        assert all(score.student_truth == score.teacher_truth for score in scores)


def test_evaluation_says_it_all(finished_run: Path) -> None:
    content = json.loads((finished_run / "run" / "evaluation.json").read_text())["masks"]
    assert content["images"] == 4
    assert 0 < content["embedding"]["mse"] < 3
    assert -1 <= content["embedding"]["cosine"] <= 1
    for prompt in ("point", "box"):
        groups = content["miou"][prompt]
        assert groups["all"]["masks"] == sum(group["masks"] for name, group in groups.items() if name != "all")
        for comparison in ("student_teacher", "student_truth", "teacher_truth"):
            assert 0 <= groups["all"][comparison] <= 1
            mean = sum(g[comparison] * g["masks"] for n, g in groups.items() if n != "all") / groups["all"]["masks"]
            assert groups["all"][comparison] == pytest.approx(mean)
    assert len(content["student_teacher_miou_by_image"]) == 4


def test_embedding_error_is_what_training_reported(finished_run: Path) -> None:
    lines = [json.loads(line) for line in (finished_run / "run" / "metrics.jsonl").read_text().splitlines()]
    content = json.loads((finished_run / "run" / "evaluation.json").read_text())["masks"]
    assert content["embedding"]["mse"] == pytest.approx(lines[-1]["val_mse"], rel=1e-4)
    assert content["embedding"]["cosine"] == pytest.approx(lines[-1]["val_cosine"], rel=1e-4)


def test_images_without_annotations_are_compared_with_the_teacher_alone(
    elsewhere: Recipe, accelerator: Accelerator, tmp_path: Path
) -> None:
    for number in range(3):
        image, _ = generate_scene(np.random.default_rng(number), 150)
        Image.fromarray(image).save(tmp_path / f"photo {number}.png")
    elsewhere.evaluate = replace(elsewhere.evaluate, data=str(tmp_path), grid=3)
    evaluate_masks(elsewhere, accelerator)
    content = result(elsewhere)
    assert content["images"] == 3
    assert set(content["miou"]) == {"point"}
    assert set(content["miou"]["point"]) == {"all"}
    assert set(content["miou"]["point"]["all"]) == {"masks", "student_teacher"}
    assert content["miou"]["point"]["all"]["masks"] == 3 * 9
    assert set(content["student_teacher_miou_by_image"]) == {f"photo {n}" for n in range(3)}


def test_evaluation_is_redone_only_for_another_student_or_setting(
    elsewhere: Recipe, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_masks(elsewhere, accelerator)
    calls = []
    original = module.load_sams
    monkeypatch.setattr(module, "load_sams", lambda *a: (calls.append(1), original(*a))[1])
    evaluate_masks(elsewhere, accelerator)
    assert calls == []
    elsewhere.evaluate = replace(elsewhere.evaluate, masks_per_image=1)
    evaluate_masks(elsewhere, accelerator)
    assert calls == [1]
    assert result(elsewhere)["miou"]["box"]["all"]["masks"] == 4


def test_another_caches_images_are_evaluated_anew(
    elsewhere: Recipe, accelerator: Accelerator, finished_run: Path, tmp_path: Path
) -> None:
    evaluate_masks(elsewhere, accelerator)
    first = result(elsewhere)
    shutil.copytree(finished_run / "cache", tmp_path / "cache")
    described = json.loads((tmp_path / "cache" / "cache.json").read_text())
    described["identity"]["data_images"] = "other.tar"
    (tmp_path / "cache" / "cache.json").write_text(json.dumps(described))
    for path in (tmp_path / "cache").glob("shard-*.h5"):
        with h5py.File(path, "r+") as file:
            file.attrs["data_images"] = "other.tar"
            file["embeddings"][:] = 0
    elsewhere.data = replace(elsewhere.data, images="other.tar")
    elsewhere.cache = replace(elsewhere.cache, dir=str(tmp_path / "cache"))
    evaluate_masks(elsewhere, accelerator)
    assert result(elsewhere)["embedding"]["mse"] != first["embedding"]["mse"]


def test_bad_images_are_left_out_and_listed(elsewhere: Recipe, accelerator: Accelerator, tmp_path: Path) -> None:
    image, _ = generate_scene(np.random.default_rng(0), 150)
    Image.fromarray(image).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"<html>")
    Image.fromarray(image).save(tmp_path / "garbled.png")
    masks = [{"segmentation": {"size": list(image.shape[:2]), "counts": "é"}}]
    (tmp_path / "garbled.json").write_text(json.dumps({"annotations": masks}))
    elsewhere.evaluate = replace(elsewhere.evaluate, data=str(tmp_path), grid=2)
    evaluate_masks(elsewhere, accelerator)
    assert result(elsewhere)["images"] == 2  # the photograph is good, and asked by a grid as those without annotation
    (bad,), (garbled,) = result(elsewhere)["skipped"], result(elsewhere)["noted"]
    assert bad["key"] == "bad"
    assert "cannot identify" in bad["reason"]
    assert garbled == {"key": "garbled", "reason": "a mask not used: an RLE that is cut short, or text of another kind"}


def test_an_annotation_that_cannot_be_decoded_is_named(recipe: Recipe) -> None:
    row = next(evaluation_rows(recipe, load_teacher("toy", None, 128)))
    broken = json.dumps({"annotations": [{"segmentation": {"size": [9, 9], "counts": "é"}}]})
    with pytest.raises(InputError, match=f"the annotation of {row.key} cannot be decoded"):
        make_prompts(replace(row, annotation=broken), recipe.evaluate)


@pytest.mark.parametrize("threads", [1, 4])
def test_prompts_that_are_made_meanwhile_are_those_of_their_images(
    recipe: Recipe, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, with what cannot be decoded in its place; and nothing that goes wrong is lost."""
    teacher, student_sam = load_sams(recipe, torch.device("cpu"))
    rows = list(evaluation_rows(recipe, teacher))
    broken = json.dumps({"annotations": [{"segmentation": {"size": [9, 9], "counts": "é"}}]})
    rows[1] = replace(rows[1], annotation=broken)
    rows += [replace(rows[0], key="again", annotation=None)]
    monkeypatch.setattr(compare, "prompt_threads", lambda device: threads)
    found = list(compare_rows(rows, recipe.evaluate, teacher, student_sam))
    assert [compared.key for compared in found] == [row.key for row in rows]
    assert [compared.trouble is None for compared in found] == [row.annotation != broken for row in rows]
    for row, compared in zip(rows, found, strict=True):
        if compared.trouble is None:
            embeddings = embed_both(row, student_sam)
            prompts = make_prompts(row, recipe.evaluate)
            assert compared.scores == list(score_image(row, teacher, *embeddings, prompts))

    monkeypatch.setattr(compare, "make_prompts", lambda row, settings: {}[row.key])
    with pytest.raises(KeyError, match=rows[0].key):
        list(compare_rows(rows, recipe.evaluate, teacher, student_sam))


def test_clicks_correct_student_and_teacher_each_for_itself(
    recipe: Recipe, elsewhere: Recipe, accelerator: Accelerator
) -> None:
    elsewhere.evaluate = replace(recipe.evaluate, clicks=3)
    assert evaluate_masks(elsewhere, accelerator)
    before, content = result(recipe), result(elsewhere)
    assert list(content["miou"]) == ["point", "box", "2 clicks", "3 clicks"]
    for same in ("images", "embedding", "student_teacher_miou_by_image"):
        assert content[same] == before[same]
    assert {name: content["miou"][name] for name in ("point", "box")} == before["miou"]
    three, one = content["miou"]["3 clicks"]["all"], content["miou"]["point"]["all"]
    assert set(three) == {"masks", "student_truth", "teacher_truth"}
    assert three["masks"] == one["masks"]
    assert three["teacher_truth"] > one["teacher_truth"]
    assert report(elsewhere, accelerator)
    page = (Path(elsewhere.run_dir) / "report" / "index.html").read_text()
    assert '<td class="name">3 clicks</td>' in page


def test_a_student_that_does_not_fit_the_decoder_is_refused(elsewhere: Recipe, accelerator: Accelerator) -> None:
    elsewhere.image_size = 192
    with pytest.raises(
        InputError,
        match=r"fit the teacher's decoder: the encoder works at 128 px, .* at 192 px",
    ):
        evaluate_masks(elsewhere, accelerator)


def test_a_cache_of_other_teacher_weights_is_refused(
    elsewhere: Recipe, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "weights_sha256", lambda _: "0" * 64)
    with pytest.raises(InputError, match="SHA-256 of the teacher's weights"):
        evaluate_masks(elsewhere, accelerator)


def test_means_by_prompt_and_size() -> None:
    scores = [
        Score("a", "point", 10, 0.5, 0.2, 0.4),
        Score("a", "box", 10, 0.9, 0.6, 0.8),
        Score("b", "box", 5000, 0.7, 0.4, 0.6),
        Score("b", "box", 96**2, 0.2, 0.3, 0.4),
    ]
    content = summarize(scores, [(1.0, 0.5), (3.0, 0.7)])
    assert content["embedding"] == {"mse": 2.0, "cosine": pytest.approx(0.6)}
    box = content["miou"]["box"]
    assert box["all"]["student_teacher"] == pytest.approx(0.6)
    assert box["small"] == {"masks": 1, "student_teacher": 0.9, "student_truth": 0.6, "teacher_truth": 0.8}
    assert (box["medium"]["masks"], box["large"]["student_teacher"]) == (1, 0.2)
    assert content["student_teacher_miou_by_image"] == {"a": pytest.approx(0.7), "b": pytest.approx(0.45)}
