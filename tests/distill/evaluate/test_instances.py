import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from segment_anything import SamPredictor

from distill.evaluate.coco import average_precision, read_coco
from distill.evaluate.decoding import Segmenter
from distill.evaluate.instances import Protocol, find, masks_of, measure, protocol_of, score_masks, summarize
from distill.recipe import Recipe, load_recipe
from embeddings_cache.images import decode_rle, encode_rle
from embeddings_cache.teacher import load_teacher
from students import InputError
from support import Cli, Layout


@pytest.fixture(scope="module")
def teacher() -> Segmenter:
    return Segmenter(load_teacher("toy", None, 128), torch.device("cpu"))


def recipe_of(data: Path, boxes: Path | None, *more: str) -> Recipe:
    tiny = ["recipe=quickstart", "image_size=128", "stage=evaluate", "evaluate.task=instances"]
    return load_recipe([*tiny, f"evaluate.data={data}", *([f"evaluate.boxes={boxes}"] if boxes else []), *more])


def measured(recipe: Recipe, segmenter: Segmenter) -> dict[str, dict[str, Any]]:
    return {item.key: measure(item, segmenter, recipe, Path("unused")) for item in find(recipe)}


def annotated(root: Path, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, dict[str, Any]]:
    """Results whose masks are the annotations, each changed."""
    known = read_coco(root)
    return {
        str(id): {
            "masks": [
                [
                    entry["category_id"],
                    0.9 - 0.01 * place,
                    encode_rle(change(decode_rle(entry["segmentation"])))["counts"],
                ]
                for place, entry in enumerate(known.annotations[id])
            ],
            "left_out": 0,
        }
        for id in known.images
    }


def by_pycocotools(root: Path, results: dict[str, dict[str, Any]]) -> COCOeval:
    """COCO's own way: its file, its results, its summary."""
    truth = COCO(str(root / "annotations" / "instances_val2017.json"))
    found = [
        {"image_id": int(key), "category_id": category, "score": score,
         "segmentation": {"size": [truth.imgs[int(key)]["height"], truth.imgs[int(key)]["width"]], "counts": counts}}
        for key, result in results.items() for category, score, counts in result["masks"]
    ]  # fmt: skip
    evaluation = COCOeval(truth, truth.loadRes(found), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def test_perfect_masks_have_an_average_precision_of_one(coco: Layout) -> None:
    root, _ = coco()
    numbers = score_masks(root, annotated(root, lambda mask: mask), "vitdet")
    assert numbers["AP"] == numbers["AP50"] == numbers["AP75"] == numbers["AR100"] == 1.0


@pytest.mark.parametrize("preset", ["vitdet", "hdetr"])
def test_worse_masks_have_what_pycocotools_gives_them(coco: Layout, preset: str) -> None:
    root, _ = coco(4)
    generator = np.random.default_rng(0)

    def worse(mask: np.ndarray) -> np.ndarray:
        return np.roll(mask, tuple(generator.integers(-4, 5, 2)), (0, 1))

    results = annotated(root, worse)
    numbers, stats = score_masks(root, results, preset), by_pycocotools(root, results).stats
    assert 0.05 < numbers["AP"] < 0.95
    shown = [numbers[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
    assert [-1.0 if value is None else value for value in shown] == pytest.approx(stats[:6].tolist())
    assert numbers["AR100"] == pytest.approx(stats[8])


def test_hdetrs_columns_count_up_to_a_thousand_masks(coco: Layout) -> None:
    root, _ = coco(1)
    ((key, result),) = annotated(root, lambda mask: mask).items()
    nothing = encode_rle(np.zeros(decode_rle(read_coco(root).annotations[100][0]["segmentation"]).shape, bool))[
        "counts"
    ]
    clutter = [[category, 0.99, nothing] for category in (1, 2) for _ in range(100)]  # fill the first hundred places
    crowded = {key: {**result, "masks": clutter + result["masks"]}}
    vitdet, hdetr = (score_masks(root, crowded, preset) for preset in ("vitdet", "hdetr"))
    assert vitdet["AP"] == hdetr["AP"] == vitdet["AP50"] == 0
    assert hdetr["AP50"] > 0


def test_masks_are_those_of_sam_predictor(coco: Layout, teacher: Segmenter) -> None:
    root, boxes_file = coco(1)
    (item,) = find(recipe_of(root, boxes_file))
    image = np.asarray(Image.open(item.image))
    boxes = np.array([entry["bbox"] for entry in json.loads(boxes_file.read_text())])
    boxes[:, 2:] += boxes[:, :2]
    predictor = SamPredictor(teacher.sam)
    predictor.set_image(image)
    for masks, multimask in (("single", False), ("best", True)):
        for refine in (False, True):
            protocol = Protocol(masks, "detector", None, refine)
            for box, (mask, predicted_iou) in zip(boxes, masks_of(teacher.look(image), boxes, protocol), strict=True):
                found, ious, low_res = predictor.predict(box=box, multimask_output=multimask)
                best = ious.argmax()
                if refine:
                    again = low_res[best][None]
                    found, ious, _ = predictor.predict(box=box, mask_input=again, multimask_output=False)
                    best = 0
                assert np.mean(found[best] != mask) < 2e-3
                assert predicted_iou == pytest.approx(float(ious[best]), abs=1e-3)


def test_the_presets_differ_where_they_should(coco: Layout, teacher: Segmenter) -> None:
    root, boxes = coco(2)
    hdetr, vitdet = (recipe_of(root, boxes, f"evaluate.preset={name}") for name in ("hdetr", "vitdet"))
    theirs, others = measured(hdetr, teacher), measured(vitdet, teacher)
    scores = {entry["score"] for entry in json.loads(boxes.read_text())}
    for key in theirs:
        assert {score for _, score, _ in others[key]["masks"]} <= scores
        for (category, times, _), (same, own, _) in zip(theirs[key]["masks"], others[key]["masks"], strict=True):
            assert category == same
            assert times != own  # times a predicted IoU, and nothing else
    one = recipe_of(root, boxes, "evaluate.preset=hdetr", "evaluate.score=detector")
    best = recipe_of(root, boxes, "evaluate.preset=hdetr", "evaluate.score=detector", "evaluate.masks=best")
    assert measured(best, teacher) == others  # then the presets are the same
    single = measured(one, teacher)
    assert [masks[2] for masks in single["100"]["masks"]] == [masks[2] for masks in theirs["100"]["masks"]]
    assert single != others
    few = measured(recipe_of(root, boxes, "evaluate.max_dets=2"), teacher)
    assert [mask[2] for mask in few["100"]["masks"]] == [mask[2] for mask in theirs["100"]["masks"][:2]]
    assert protocol_of(hdetr) == Protocol("single", "times_iou", 300)
    assert protocol_of(vitdet) == Protocol("best", "detector", None)


def test_the_toy_segments_scenes_by_their_boxes(coco: Layout, teacher: Segmenter) -> None:
    root, boxes = coco(3)
    recipe = recipe_of(root, boxes)
    results = measured(recipe, teacher)
    numbers = summarize(results, recipe)
    assert numbers["AP50"] > 0.5
    truth = by_pycocotools(root, results)
    assert numbers["AP"] == pytest.approx(truth.stats[0])


def test_everything_takes_no_boxes_and_ignores_classes(coco: Layout) -> None:
    root, boxes = coco(4)
    recipe = recipe_of(root, None, "evaluate.preset=everything")
    with pytest.raises(InputError, match="preset=everything takes none"):
        find(replace(recipe, evaluate=replace(recipe.evaluate, boxes=str(boxes))))
    item = find(recipe)[3]
    sharp = Segmenter(load_teacher("toy", None, 256), torch.device("cpu"))  # at 128 px it is not sure of any mask
    result = measure(item, sharp, recipe, Path("unused"))
    known = read_coco(root).annotations[item.id]
    truths = [decode_rle(annotation["segmentation"]) for annotation in known]
    found = [decode_rle({"size": [*truths[0].shape], "counts": counts}) for _, _, counts in result["masks"]]
    ious = [max(float((mask & truth).sum() / (mask | truth).sum()) for mask in found) for truth in truths]
    recalls = [np.mean([iou >= threshold for iou in ious]) for threshold in np.arange(0.5, 1, 0.05)]
    assert 0.1 < np.mean(recalls) < 1
    assert summarize({item.key: result}, recipe)["AR100"] == pytest.approx(np.mean(recalls))


def test_no_masks_at_all_are_zero(coco: Layout) -> None:
    root, _ = coco(1)
    precision = average_precision(read_coco(root), [100], [], (100,))
    assert (precision.ap(100), precision.ar(100)) == (0.0, 0.0)


def edited(path: Path, change: Callable[[Any], Any]) -> Path:
    """A JSON with something changed, beside it."""
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))
    read_coco.cache_clear()
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda boxes: [{**boxes[0], "image_id": 7}], "is not of .*instances_val2017.json: image_id 7"),
        (lambda boxes: [{**boxes[0], "category_id": 9}], "is not of .*: category_id 9"),
        (lambda boxes: [], "is not of .*: no boxes"),
        (lambda boxes: [{**boxes[0], "bbox": [1, 2, float("nan"), 4]}], "is not a results file of COCO's"),
        (lambda boxes: [{"image_id": 100}], "is not a results file of COCO's: KeyError"),
        (lambda boxes: {"boxes": boxes}, "is not a results file of COCO's"),
    ],
)
def test_boxes_of_something_else_are_refused(coco: Layout, change: Callable[[Any], Any], said: str) -> None:
    root, boxes = coco(1)
    edited(boxes, change)
    with pytest.raises(InputError, match=said):
        find(recipe_of(root, boxes))


def test_boxes_outside_of_their_image_are_left_out_and_counted(coco: Layout, teacher: Segmenter) -> None:
    root, boxes = coco(1)
    usual = measured(recipe_of(root, boxes), teacher)["100"]["masks"]
    away = [{"image_id": 100, "category_id": 1, "score": score, "bbox": box} for score, box in
            ((0.99, [500, 10, 20, 20]), (0.98, [10, 10, 0, 20]), (0.97, [-50, -50, 40, 40]))]  # fmt: skip
    more = boxes.with_name("more.json")
    more.write_text(json.dumps([*json.loads(boxes.read_text()), *away]))
    recipe = recipe_of(root, more)
    found = measured(recipe, teacher)
    assert found["100"] == {"masks": usual, "left_out": 3}
    assert summarize(found, recipe)["boxes_left_out"] == 3


def bad_size(content: dict[str, Any]) -> None:
    content["annotations"][0]["segmentation"] = encode_rle(np.ones((7, 9), bool))


def bad_runs(content: dict[str, Any]) -> None:
    content["annotations"][0]["segmentation"]["counts"] = "Zd2"


def segmented(drawn: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["annotations"][0].update(segmentation=drawn)


def other_photograph(content: dict[str, Any]) -> None:
    content["images"][0]["height"] = 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (bad_size, "annotation 1: a mask of 9×7 px on an image of"),
        (bad_runs, "annotation 1: "),
        (segmented([[]]), "annotation 1: a polygon that is none"),
        (segmented([[1, 2, 3, 4]]), "annotation 1: a polygon that is none"),
        (segmented([[1, 2, 3, 4, "5", 6]]), "annotation 1: a polygon that is none"),
        (segmented("abc"), "annotation 1: "),
        (other_photograph, "annotation 1: a mask of|has .* px, and"),
    ],
)
def test_a_bad_annotation_costs_its_image_alone(
    coco: Layout, teacher: Segmenter, change: Callable[[Any], None], said: str
) -> None:
    root, boxes = coco(2)
    edited(root / "annotations" / "instances_val2017.json", change)
    recipe = recipe_of(root, boxes)
    bad, good = find(recipe)
    with pytest.raises(InputError, match=said):
        measure(bad, teacher, recipe, Path("unused"))
    assert summarize({good.key: measure(good, teacher, recipe, Path("unused"))}, recipe)["AP"] > 0


def test_an_empty_mask_is_not_missed(coco: Layout) -> None:
    root, _ = coco(1)

    def emptied(content: dict[str, Any]) -> None:
        shape = [content["images"][0]["height"], content["images"][0]["width"]]
        extra = {**content["annotations"][0], "id": 99, "area": 0, "segmentation": encode_rle(np.zeros(shape, bool))}
        content["annotations"].append(extra)

    perfect = annotated(root, lambda mask: mask)
    edited(root / "annotations" / "instances_val2017.json", emptied)
    assert score_masks(root, perfect, "vitdet")["AR100"] == 1.0


def test_annotations_may_be_numbered_from_nought(coco: Layout) -> None:
    root, _ = coco(2)

    def renumbered(content: dict[str, Any]) -> None:
        for number, annotation in enumerate(content["annotations"]):
            annotation["id"] = number // 2  # and twice the same

    perfect = annotated(root, lambda mask: mask)
    edited(root / "annotations" / "instances_val2017.json", renumbered)
    assert score_masks(root, perfect, "vitdet")["AP"] == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: [each.pop("segmentation") for each in content["annotations"]] and None, "has boxes alone"),
        (lambda content: content["annotations"][0].update(area=None), "lacks a number or file_name"),
        (lambda content: content["images"][0].update(id="100"), "lacks a number or file_name"),
        (lambda content: content.pop("categories") and None, "is not COCO's format: KeyError"),
    ],
)
def test_what_is_no_coco_set_is_refused(coco: Layout, change: Callable[[Any], Any], said: str) -> None:
    root, boxes = coco(1)
    edited(root / "annotations" / "instances_val2017.json", change)
    with pytest.raises(InputError, match=said):
        find(recipe_of(root, boxes))


def test_sets_are_found_as_they_are_laid_out(coco: Layout, tmp_path: Path) -> None:
    root, boxes = coco(1)
    file = root / "annotations" / "instances_val2017.json"
    assert find(recipe_of(root, boxes)) == [replace(item, coco=root) for item in find(recipe_of(file, boxes))]
    lvis = json.loads(file.read_text())
    for image in lvis["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
    (root / "lvis_v1_val.json").write_text(json.dumps(lvis))
    (item,) = find(recipe_of(root / "lvis_v1_val.json", boxes))
    assert item.image.exists()
    (root / "val2017").rename(root / "moved")
    read_coco.cache_clear()
    with pytest.raises(InputError, match=r"its images are not there; 000000000000\.png was looked for in .*val2017"):
        find(recipe_of(root, boxes))
    with pytest.raises(InputError, match=r"has no annotations in COCO's format"):
        find(recipe_of(tmp_path, boxes))
    (root / "annotations" / "instances_val2014.json").write_text("{}")
    with pytest.raises(InputError, match=r"several annotation files, instances_val2014\.json, instances_val2017\.json"):
        find(recipe_of(root, boxes))


def test_instances_from_the_command_line(coco: Layout, student: Path, tmp_path: Path, cli: Cli) -> None:
    root, boxes = coco(2)
    where = f"run_dir={tmp_path / 'out'}"
    arguments = ["stage=evaluate", "evaluate.task=instances", f"evaluate.data={root}", where]
    missing = cli(*arguments, f"checkpoint=[{student}, teacher]")
    assert missing.returncode == 2
    assert "evaluate.task=instances takes a detector's boxes: evaluate.boxes=RESULTS.json" in missing.stderr
    result = cli(*arguments, f"checkpoint=[{student}, teacher]", f"evaluate.boxes={boxes}", "evaluate.max_dets=50")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 images; hdetr, max_dets=50") == 2
    numbers = json.loads((tmp_path / "out" / "evaluation.json").read_text())["instances"]["results"]
    assert 0 <= numbers["run"]["AP"] < numbers["teacher"]["AP"]
    assert numbers["run"]["of_the_teachers"]["AP"] == numbers["run"]["AP"] / numbers["teacher"]["AP"]


def test_wild_is_the_mean_of_its_sets(coco: Layout, student: Path, tmp_path: Path, cli: Cli) -> None:
    root, boxes = tmp_path / "wild", tmp_path / "boxes"
    boxes.mkdir()
    for count, name in ((1, "Airplane-Parts"), (3, "Bottles")):
        made, results = coco(count, tmp_path / name)
        (made / "val2017").rename(made / "valid")
        (made / "annotations" / "instances_val2017.json").rename(made / "valid" / "_annotations_min1cat.coco.json")
        results.rename(boxes / f"{name}.json")
        root.mkdir(exist_ok=True)
        made.rename(root / name)
    arguments = ["stage=evaluate", "evaluate.task=wild", f"evaluate.data={root}", f"run_dir={tmp_path / 'out'}"]
    result = cli(*arguments, f"checkpoint=[{student}, teacher]", f"evaluate.boxes={boxes}")
    assert result.returncode == 0, result.stderr
    assert "mean of 2 sets, of 25" in result.stdout
    numbers = json.loads((tmp_path / "out" / "evaluation.json").read_text())["wild"]["results"]["teacher"]
    each = {name: sets["AP"] for name, sets in numbers["sets"].items()}
    assert numbers["AP"] == pytest.approx((each["Airplane-Parts"] + each["Bottles"]) / 2)
    assert each["Airplane-Parts"] != each["Bottles"]
    single = ["evaluate.score=detector", "evaluate.max_dets=100", f"evaluate.boxes={boxes / 'Bottles.json'}"]
    same = cli(
        "stage=evaluate", "evaluate.task=instances", f"evaluate.data={root / 'Bottles' / 'valid'}", *single,
        "checkpoint=teacher", "teacher.name=toy", "image_size=128", f"run_dir={tmp_path / 'one'}",
    )  # fmt: skip
    assert same.returncode == 0, same.stderr
    alone = json.loads((tmp_path / "one" / "evaluation.json").read_text())["instances"]["results"]["teacher"]
    assert alone["AP"] == pytest.approx(each["Bottles"])
    (boxes / "Bottles.json").unlink()
    gone = cli(*arguments, f"checkpoint=[{student}, teacher]", f"evaluate.boxes={boxes}")
    assert gone.returncode == 2
    assert "has no Bottles.json" in gone.stderr
