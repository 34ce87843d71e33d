"""`segment.py` and `segmenter.py`, as they lie in an export: `SamPredictor` says what they have to come to."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamPredictor

from distill.evaluate.ious import mask_iou
from distill.main import main
from embeddings_cache.images.decoding import decode_image
from programs import PROMPTS, block, expect, expect_all, picture, pictures, place
from students import read_metadata, save_student
from support import TINY, places

PACKAGES = {"numpy", "onnxruntime", "PIL"}
"""What `pip install onnxruntime numpy pillow` brings."""


def segment(export: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, export / "segment.py", *map(str, arguments)]
    return subprocess.run(command, cwd=export, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(pictures()))
def test_the_masks_are_the_predictors(export: Path, predictor: SamPredictor, tmp_path: Path, name: str) -> None:
    photo = tmp_path / name
    photo.write_bytes(pictures()[name])
    image = decode_image(photo.read_bytes())
    height, width = image.shape[:2]
    predictor.set_image(image)
    shares = []
    for kind, prompt in PROMPTS.items():
        points, box = place(prompt, (width, height))
        on = [f"{x},{y}" for x, y, label in points if label]
        off = [part for x, y, label in points if not label for part in ("--off", f"{x},{y}")]
        more = [*(["--box", ",".join(map(str, box))] if box else []), *(["--refine"] if prompt.refine else [])]
        done = segment(export, photo, *on, *off, *more, "--out", tmp_path / "found.png")
        assert done.returncode == 0, done.stderr
        expected = expect_all(predictor, points, box, prompt.refine)
        mask = np.asarray(Image.open(tmp_path / "found.png"))
        assert mask.shape == (height, width)
        assert set(np.unique(mask)) <= {0, 255}
        assert mask_iou(mask > 0, expected.mask) >= 0.99, kind
        said = re.fullmatch(r".*found\.png: (\d+) pixels, predicted IoU (\d\.\d{3})\n", done.stdout)
        assert said, done.stdout
        assert int(said[1]) == (mask > 0).sum()
        assert float(said[2]) == pytest.approx(expected.iou, abs=2e-3)
        shares.append(expected.mask.mean())
    assert sum(0.01 < share < 0.99 for share in shares) >= 3, shares  # or there would be nothing to compare


@pytest.mark.slow
def test_stage_predict_says_the_same(export: Path, predictor: SamPredictor, finished_run: Path, tmp_path: Path) -> None:
    """On the command line, of the student that was exported."""
    checkpoint = tmp_path / "s.safetensors"
    metadata = read_metadata(finished_run / "run" / "student.safetensors")
    save_student(checkpoint, predictor.model.image_encoder, metadata)
    photo = tmp_path / "turned.jpg"
    photo.write_bytes(pictures()[photo.name])
    asked = [*TINY, *places(tmp_path, "gone.tar"), "stage=predict", f"checkpoint={checkpoint}", f"image={photo}"]
    for ours, theirs in ((["48,85"], ["point=48,85"]), (["--box", "24,17,96,153"], ["box=24,17,96,153"])):
        assert main([*asked, *theirs]) == 0
        expected = np.asarray(Image.open(tmp_path / "run" / "predict" / "turned-mask.png")) > 0
        done = segment(export, photo, *ours, "--out", tmp_path / "found.png")
        assert done.returncode == 0, done.stderr
        assert mask_iou(np.asarray(Image.open(tmp_path / "found.png")) > 0, expected) >= 0.99
        assert 0.01 < expected.mean() < 0.99


@pytest.mark.slow
def test_a_mask_for_a_screen_is_the_same_mask(export: Path, predictor: SamPredictor, tmp_path: Path) -> None:
    photo = tmp_path / "landscape.jpg"
    photo.write_bytes(pictures()[photo.name])
    predictor.set_image(decode_image(photo.read_bytes()))
    expected = expect(predictor, [(84, 75, 1)])
    for longest in (100, 333):
        done = segment(export, photo, "84,75", "--longest", str(longest), "--out", tmp_path / "found.png")
        assert done.returncode == 0, done.stderr
        mask = np.asarray(Image.open(tmp_path / "found.png"))
        assert mask.shape == (round(150 * longest / 209), longest)
        low_res = torch.from_numpy(expected.low_res)[None]
        shown = predictor.model.postprocess_masks(low_res, predictor.input_size, mask.shape)[0, 0].numpy() > 0
        assert mask_iou(mask > 0, shown) >= 0.98
        assert 0.01 < shown.mean() < 0.99


@pytest.mark.slow
def test_what_is_wrong_is_one_line(export: Path, tmp_path: Path) -> None:
    photo = tmp_path / "portrait.png"
    photo.write_bytes(pictures()[photo.name])
    (tmp_path / "words.jpg").write_text("hello")
    for arguments, reason in {
        (photo, "61,3"): "61,3 lies outside of the photo, which has 60×190 pixels",
        (photo, "nan,3"): "nan,3 lies outside",
        (photo, "--box=-1,0,9,9"): "-1,0 lies outside of the photo",
        (photo,): "neither a point nor a box says what to segment",
        (tmp_path / "words.jpg", "1,1"): "not a picture of a kind that can be read",
        (tmp_path / "gone.jpg", "1,1"): "gone.jpg: no such file",
        (photo, "1,1", "--encoder", tmp_path / "gone.onnx"): "gone.onnx: no such file",
        (photo, "1,1", "--encoder", export / "decoder.onnx"): "Required inputs",
        (photo, "1,1", "--encoder", export / "package.json"): "package.json",
        (photo, "1,1", "--longest", "0"): "longest",
        (photo, "1"): "invalid point value: '1'",
        (photo, "--box", "1,2,3"): "invalid box value",
    }.items():
        done = segment(export, *arguments, "--out", tmp_path / "mask.png")
        assert done.returncode == 2, arguments
        assert reason in done.stderr.splitlines()[-1], arguments
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "mask.png").exists()
    assert segment(export, photo, "60,190", "--out", tmp_path / "mask.png").returncode == 0  # the corner is inside


@pytest.mark.slow
def test_what_the_readme_says_works_as_it_stands(export: Path, predictor: SamPredictor) -> None:
    """Its commands and its code, on a picture that has all the places that these name."""
    Image.fromarray(picture(420, 600)).save(export / "photo.jpg", quality=95)
    predictor.set_image(decode_image((export / "photo.jpg").read_bytes()))
    readme = (export / "README.md").read_text()
    lines = block(readme, "bash", "Python").splitlines()
    assert lines[0] == "pip install onnxruntime numpy pillow"
    expected = [
        expect(predictor, [(320, 240, 1)]),
        expect(predictor, [(320, 240, 1), (410, 200, 1), (90, 300, 0)]),
        expect(predictor, [], [100, 80, 420, 400]),
    ]
    for line, right in zip(lines[1:], expected, strict=True):
        command = line.replace("python", sys.executable, 1)
        done = subprocess.run(command, shell=True, cwd=export, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert mask_iou(np.asarray(Image.open(export / "mask.png")) > 0, right.mask) >= 0.99
        assert 0.01 < right.mask.mean() < 0.99
    (export / "own.py").write_text(block(readme, "python", "Python") + "import numpy\nnumpy.save('own', better.mask)\n")
    done = subprocess.run([sys.executable, "own.py"], cwd=export, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    better = expect_all(predictor, [(320, 240, 1), (90, 300, 0)], None, refine=True)
    assert mask_iou(np.load(export / "own.npy"), better.mask) >= 0.99


@pytest.mark.slow
def test_nothing_else_is_needed(export: Path) -> None:
    """Of what is no part of Python."""
    asked = {
        name
        for file in ("segment.py", "segmenter.py")
        for name in re.findall(r"^(?:from|import) (\w+)", (export / file).read_text(), re.MULTILINE)
    }
    assert asked - sys.stdlib_module_names == PACKAGES | {"segmenter"}
