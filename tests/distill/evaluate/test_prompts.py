import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from scipy.ndimage import distance_transform_edt
from segment_anything import SamPredictor

from distill.evaluate.clicks import next_click
from distill.evaluate.coco import read_coco
from distill.evaluate.decoding import Segmenter
from distill.evaluate.prompts import COLUMNS, find, measure, summarize
from distill.recipe import Recipe, load_recipe
from embeddings_cache.images import encode_rle
from embeddings_cache.teacher import load_teacher
from students import InputError
from support import Cli, Layout


@pytest.fixture(scope="module")
def teacher() -> Segmenter:
    return Segmenter(load_teacher("toy", None, 128), torch.device("cpu"))


def recipe_of(data: Path) -> Recipe:
    tiny = ["recipe=quickstart", "image_size=128", "stage=evaluate", "evaluate.task=prompts"]
    return load_recipe([*tiny, f"evaluate.data={data}"])


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_boxes_and_clicks_are_what_a_user_of_sam_predictor_gets(coco: Layout, teacher: Segmenter) -> None:
    root, _ = coco(1)
    recipe = recipe_of(root)
    (item,) = find(recipe)
    result = measure(item, teacher, recipe, Path("unused"))
    predictor = SamPredictor(teacher.sam)
    predictor.set_image(np.asarray(Image.open(item.image)))
    truth_of = COCO(str(root / "annotations" / "instances_val2017.json"))
    annotations = truth_of.loadAnns(truth_of.getAnnIds(imgIds=[item.id]))
    assert result["area"] == [each["area"] for each in annotations]
    worst = 1.0
    for each, box_iou, clicks in zip(annotations, result["box"], result["clicks"], strict=True):
        truth = truth_of.annToMask(each).astype(bool)
        x, y, width, height = each["bbox"]
        found, _, _ = predictor.predict(box=np.array([x, y, x + width, y + height]), multimask_output=False)
        assert box_iou == pytest.approx(iou(found[0], truth), abs=5e-3)
        points, labels, low_res, mask = [], [], None, np.zeros_like(truth)
        for number in range(5):
            wrong = np.pad(mask ^ truth, 1)
            y, x = np.unravel_index(distance_transform_edt(wrong)[1:-1, 1:-1].argmax(), truth.shape)
            points.append((x, y))
            labels.append(int(truth[y, x]))
            found, ious, logits = predictor.predict(
                np.array(points), np.array(labels), mask_input=low_res, multimask_output=number == 0
            )
            mask, low_res = found[ious.argmax()], logits[ious.argmax()][None]
            assert clicks[number] == pytest.approx(iou(mask, truth), abs=0.02)
        worst = min(worst, *clicks)
    assert worst < 0.8  # otherwise nothing would have been corrected


def test_clicks_go_where_a_mask_is_most_wrong() -> None:
    truth, mask = np.zeros((40, 60), bool), np.zeros((40, 60), bool)
    truth[5:16, 5:16] = True
    mask[5:16, 5:10] = True  # of the object six columns are missing
    x, y, label = next_click(mask, truth)
    assert (x in (12, 13), 7 <= y <= 13, label) == (True, True, 1)
    mask[20:35, 30:45] = True  # and a larger part is not of it
    assert next_click(mask, truth) == (37.0, 27.0, 0)
    assert next_click(truth, truth) == (0.0, 0.0, -1)


def test_means_by_hand(coco: Layout) -> None:
    recipe = recipe_of(coco(1)[0])
    results = {
        "1": {"area": [10, 2000], "box": [0.5, 1.0], "clicks": [[0.1, 0.2, 0.3, 0.4, 0.5], [1.0] * 5]},
        "2": {"area": [99999], "box": [0.6], "clicks": [[0.4, 0.5, 0.6, 0.7, 0.9]]},
        "3": {"area": [], "box": [], "clicks": []},
    }
    numbers = summarize(results, recipe)
    assert [numbers[name] for name in COLUMNS] == pytest.approx([0.7, 0.5, 1.7 / 3, 1.9 / 3, 0.7, 0.8])
    assert numbers["objects"] == 3
    assert {size: of["box"] for size, of in numbers["by_size"].items()} == {"small": 0.5, "medium": 1.0, "large": 0.6}
    assert numbers["by_size"]["large"]["5 clicks"] == 0.9
    assert summarize({"3": results["3"]}, recipe)["box"] is None


def test_polygons_are_drawn_as_coco_draws_them(coco: Layout, teacher: Segmenter) -> None:
    root, _ = coco(1)
    file = root / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    size = [content["images"][0]["height"], content["images"][0]["width"]]
    (first, second, crowd, nothing, *_) = content["annotations"]
    first["segmentation"] = [[20.2, 10.7, 60.1, 12.3, 40.5, 50.9], [70, 20, 80, 20, 80, 35, 70, 35]]
    mask = np.zeros(size, np.uint8)
    mask[10:30, 20:50] = 1
    second["segmentation"] = {"size": size, "counts": [0, *_runs(mask)] if mask[0, 0] else _runs(mask)}
    crowd["iscrowd"] = 1
    nothing["segmentation"] = [[3.1, 3.1, 3.2, 3.1, 3.2, 3.2]]  # too small for a pixel
    content["annotations"] = [first, second, crowd, nothing]
    file.write_text(json.dumps(content))
    read_coco.cache_clear()
    recipe = recipe_of(root)
    (item,) = find(recipe)
    drawn = measure(item, teacher, recipe, Path("unused"))
    truth_of = COCO(str(file))
    for each in (first, second):  # the same masks as RLEs
        each["segmentation"] = encode_rle(truth_of.annToMask(truth_of.anns[each["id"]]).astype(bool))
    content["annotations"] = [first, second]
    file.write_text(json.dumps(content))
    read_coco.cache_clear()
    assert measure(item, teacher, recipe, Path("unused")) == drawn
    assert len(drawn["box"]) == 2


def _runs(mask: np.ndarray) -> list[int]:
    """Uncompressed runs of a mask that begins with 0, by columns."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    return np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()


def test_a_set_without_annotations_is_refused(coco: Layout) -> None:
    root, _ = coco(1)
    file = root / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    read_coco.cache_clear()
    with pytest.raises(InputError, match=r"instances_val2017\.json has no annotations"):
        find(recipe_of(root))


def test_a_student_beside_its_teacher(coco: Layout, student: Path, tmp_path: Path, cli: Cli) -> None:
    root, _ = coco(2)
    where = [f"evaluate.data={root / 'annotations' / 'instances_val2017.json'}", f"run_dir={tmp_path / 'out'}"]
    result = cli("stage=evaluate", "evaluate.task=prompts", f"checkpoint=[{student}, teacher]", *where)
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "out" / "evaluation.json").read_text())["prompts"]["results"]
    for column in COLUMNS:
        assert 0 < numbers["run"][column] < numbers["teacher"][column] <= 1
    assert numbers["teacher"]["5 clicks"] > numbers["teacher"]["1 click"]
    again = cli("stage=evaluate", f"checkpoint=[{student}, teacher]", *where)  # masks, of a file of COCO's
    assert "evaluation.json is current for prompts" in again.stdout, again.stderr
    nobody = cli("stage=evaluate", f"checkpoint=[{student}, teacher]", where[1])
    assert nobody.returncode == 2
    assert "evaluate.data=None: evaluate.task=prompts takes one file or folder" in nobody.stderr


def test_annotations_beside_pictures_are_the_same_objects(coco: Layout, teacher: Segmenter, tmp_path: Path) -> None:
    """As SA-1B has them, a file a picture, in folders."""
    root, _ = coco(1)
    photos = tmp_path / "photos" / "sa_000001"
    photos.mkdir(parents=True)
    (picture,) = (root / "val2017").iterdir()
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    Image.open(picture).save(photos / "sa_1.png")
    Image.open(picture).save(photos / "not_annotated.png")
    (photos / "sa_1.json").write_text(json.dumps({"image": {}, "annotations": content["annotations"]}))
    recipe, of_coco = recipe_of(tmp_path / "photos"), recipe_of(root)
    (item,) = find(recipe)
    assert (item.key, item.image.name) == ("sa_000001/sa_1", "sa_1.png")
    result = measure(item, teacher, recipe, Path("unused"))
    assert result == measure(*find(of_coco), teacher, of_coco, Path("unused"))
    assert len(result["box"]) > 3
    (photos / "sa_1.json").write_text('{"caption": "a scene"}')
    with pytest.raises(InputError, match=r"sa_1\.json lists no masks"):
        measure(item, teacher, recipe, Path("unused"))


def test_archives_are_to_be_unpacked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sa_000001\.tar: prompts are read from files; unpack it"):
        find(recipe_of(tmp_path / "sa_000001.tar"))
