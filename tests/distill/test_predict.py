import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segment_anything import SamPredictor

from distill.launch import create_accelerator
from distill.main import main
from distill.predict import Prediction, everything, write_prediction
from distill.recipe import load_recipe
from distill.run import claim_run_dir
from distill.train import train
from embeddings_cache.images.rle import decode_rle, encode_rle
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.teacher.loading import load_teacher
from students import build_student_sam, load_student, save_student
from support import ROOT, TINY, Cli, places


@pytest.fixture(scope="module")
def run(finished_run: Path, scene_tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student has learnt long enough to find something."""
    directory = tmp_path_factory.mktemp("predict") / "run"
    longer = (f"run_dir={directory}", "train.epochs=40", "train.workers=0", "train.watch_images=0")
    recipe = load_recipe([*TINY, *places(finished_run, scene_tar), *longer])
    claim_run_dir(recipe)
    train(recipe, create_accelerator(recipe))
    return directory


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene as a photograph that is stored lying on its side."""
    path = tmp_path_factory.mktemp("photos") / "my photo.jpg"
    image = Image.fromarray(generate_scene(np.random.default_rng(5), 300)[0])
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by 90° to the left
    image.transpose(Image.Transpose.ROTATE_270).save(path, quality=95, exif=exif)
    return path


def predictor(run: Path, photo: Path) -> SamPredictor:
    student = load_student(run / "student.safetensors")
    found = SamPredictor(build_student_sam(student, load_teacher("toy", None, 128)))
    with Image.open(photo) as image:
        found.set_image(np.asarray(image.rotate(90, expand=True)))
    return found


@pytest.mark.parametrize("prompts", [{"point": "150,100"}, {"box": "60,40,200,150"}, {"point": "150,100,90,80"}])
def test_a_prompt_gives_the_predictors_mask(prompts: dict[str, str], run: Path, photo: Path, cli: Cli) -> None:
    result = cli("stage=predict", f"run_dir={run}", f"image={photo}", *(f"{k}={v}" for k, v in prompts.items()))
    assert result.returncode == 0, result.stderr
    points = np.array([float(v) for v in prompts.get("point", "").split(",") if v]).reshape(-1, 2)
    masks, ious, _ = predictor(run, photo).predict(
        point_coords=points if len(points) else None,
        point_labels=np.ones(len(points)) if len(points) else None,
        box=np.array([float(v) for v in prompts["box"].split(",")]) if "box" in prompts else None,
        multimask_output=len(points) == 1,
    )
    said = json.loads((run / "predict" / "my photo.json").read_text())
    with Image.open(run / "predict" / "my photo-mask.png") as picture:
        written = np.asarray(picture)
    assert set(np.unique(written)) == {0, 255}
    assert np.array_equal(written == 255, masks[ious.argmax()])
    (mask,) = said["masks"]
    assert np.array_equal(decode_rle(mask["segmentation"]), written == 255)
    assert mask["predicted_iou"] == pytest.approx(ious.max(), abs=1e-5)
    assert mask["area"] == (written == 255).sum()
    assert (said["height"], said["width"]) == written.shape
    assert f"predicted IoU {ious.max():.3f}" in result.stdout
    assert str(run / "predict" / "my photo-mask.png") in result.stdout
    with Image.open(run / "predict" / "my photo-overlay.png") as overlay:
        assert overlay.size == written.shape[::-1]
        changed = (np.asarray(overlay).astype(int) != predictor_image(photo)).any(axis=2)
    assert changed.mean() >= (written == 255).mean() * 0.9


def predictor_image(photo: Path) -> np.ndarray:
    with Image.open(photo) as image:
        return np.asarray(image.rotate(90, expand=True)).astype(int)


def test_without_prompts_everything_is_segmented(photo: Path) -> None:
    with Image.open(photo) as image:
        pixels = np.asarray(image.rotate(90, expand=True))
    found = everything(load_teacher("toy", None, 256), pixels, load_recipe(["recipe=quickstart"]).predict)
    areas = [entry.mask.sum() for entry in found]
    assert areas == sorted(areas, reverse=True)
    truth = generate_scene(np.random.default_rng(5), 300)[1]
    best = [max((m & e.mask).sum() / (m | e.mask).sum() for e in found) for m in truth]
    assert np.median(best) > 0.7


MEASURED = """
import sys
from distill.benchmark.machine import peak_bytes
from distill.main import main

small, large, *settings = sys.argv[1:]
assert main(["stage=predict", f"image={small}", *settings]) == 0
before = peak_bytes()
assert main(["stage=predict", f"image={large}", *settings]) == 0
print(peak_bytes() - before)
"""


@pytest.mark.slow
def test_everything_in_a_large_photograph_takes_little_memory(run: Path, tmp_path: Path) -> None:
    """24 megapixels, and every mask is kept. All masks of nine points at once would take 2.6 GB, and as much again.

    Beyond what the same command takes for a small photograph: what libraries take differs from machine to machine."""
    scene = Image.fromarray(generate_scene(np.random.default_rng(5), 300)[0])
    images = [tmp_path / "small.jpg", tmp_path / "large.jpg"]
    for image, size in zip(images, ((300, 200), (6000, 4000)), strict=True):
        scene.resize(size).save(image)
    settings = ("points_per_side=3", "pred_iou_thresh=0", "stability_score_thresh=0")
    command = [sys.executable, "-c", MEASURED, *map(str, images), f"run_dir={run}"]
    command += [f"predict.{setting}" for setting in settings]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) < 7e8
    assert len(json.loads((run / "predict" / "large.json").read_text())["masks"]) > 1


def test_a_photograph_of_too_many_pixels_is_named(run: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage=predict", f"run_dir={run}", f"image={photo}", "data.max_pixels=10000"]) == 2
    assert "px are more than data.max_pixels=10000" in capsys.readouterr().err


def test_all_masks_go_into_one_picture(tmp_path: Path) -> None:
    masks = np.zeros((3, 20, 30), dtype=bool)
    masks[0, :15], masks[1, 5:10, 5:10], masks[2, 18:] = True, True, True
    found = [Prediction(encode_rle(mask), 0.9 - 0.1 * number) for number, mask in enumerate(masks)]
    image = np.full((20, 30, 3), 128, dtype=np.uint8)
    mask_path, _, json_path = write_prediction(tmp_path / "x", image, found, None, None)
    with Image.open(mask_path) as picture:
        labels = np.asarray(picture)
    assert (labels[0, 0], labels[7, 7], labels[16, 0], labels[19, 0]) == (1, 2, 0, 3)
    said = json.loads(json_path.read_text())["masks"]
    assert [entry["predicted_iou"] for entry in said] == pytest.approx([0.9, 0.8, 0.7])
    assert all(np.array_equal(decode_rle(e["segmentation"]), mask) for e, mask in zip(said, masks, strict=True))
    assert said[1]["box"] == [5, 5, 10, 10]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "stage=predict needs a photograph: image=FILE"),
        (("image=none.jpg",), "image=none.jpg: no such file"),
        (("image={photo}", "point=5"), "command line: point=5 is not x,y in pixels of the image"),
        (("image={photo}", "box=9,9,4,20"), "command line: box=9,9,4,20 is not x0,y0,x1,y1 in pixels of the image"),
        (("image={photo}", "point=nan,4"), "command line: point=nan,4 is not x,y in pixels of the image"),
        (("image={photo}", "point=1,4000"), "point=1,4000 lies outside of the image, "),
        (("image={run}/recipe.yaml",), "cannot be read: UnidentifiedImageError"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], said: str, run: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tuple(argument.format(photo=photo, run=run) for argument in arguments)
    assert main(["stage=predict", f"run_dir={run}", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_prediction_leaves_the_run_as_it_is(run: Path, photo: Path, cli: Cli) -> None:
    before = contents(run)
    result = cli("stage=predict", f"run_dir={run}", f"image={photo}", "point=9,9")
    assert result.returncode == 0, result.stderr
    assert "generated scenes" not in result.stdout
    assert contents(run) == before


def contents(run: Path) -> dict[Path, bytes]:
    files = (path for path in run.rglob("*") if path.is_file() and "predict" not in path.relative_to(run).parts)
    return {path: path.read_bytes() for path in files}


@pytest.mark.slow
def test_a_student_of_another_teacher_is_pointed_out(run: Path, photo: Path, tmp_path: Path, cli: Cli) -> None:
    student = load_student(run / "student.safetensors")
    save_student(tmp_path / "s.safetensors", student, {"teacher_sha256": "0" * 64})
    arguments = ("stage=predict", f"run_dir={run}", f"image={photo}", "point=9,9")
    assert "learnt from other weights" not in cli(*arguments).stdout
    assert "learnt from other weights" in cli(*arguments, f"checkpoint={tmp_path / 's.safetensors'}").stdout
