"""`segment.py` and `segmenter.py`, as they lie in an export: `SamPredictor` says what they have to come to."""

import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from segment_anything import SamPredictor

from distill.clients.segmenter import Segmenter
from distill.evaluate.ious import mask_iou
from distill.main import main
from embeddings_cache.images.decoding import decode_image
from programs import block, check_masks, check_sizes, expect, expect_all, picture, pictures
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
    (tmp_path / name).write_bytes(pictures()[name])
    check_masks(partial(segment, export), predictor, tmp_path / name)


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
    check_sizes(partial(segment, export), predictor, tmp_path)


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
        (photo, "1,1", "--encoder", export / "decoder.onnx"): "decoder.onnx is no encoder",
        (photo, "--box", "5,5,5,5"): "the corners of a box are one point, 5,5",
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
def test_what_no_mask_can_be_made_of_is_refused(export: Path, tmp_path: Path) -> None:
    segmenter = Segmenter(str(export))
    embedding = segmenter.embed(Image.fromarray(picture(60, 80)))
    for given, reason in (
        ({}, "neither a point nor a box"),
        ({"points": [(1, float("nan"))], "labels": [1]}, "is not a number"),
        ({"box": (1, 2, float("inf"), 4)}, "is not a number"),
        ({"points": [(1, 2), (3, 4)], "labels": [1]}, "each of 2 points has a label"),
        ({"points": [(1, 2, 1), (3, 4, 0)], "labels": [1, 0]}, "a point is x, y"),
        ({"points": [(1, 2)], "labels": [1], "shown": (60, 80)}, "has another shape than the picture"),
        ({"points": [(1, 2)], "labels": [2]}, "1 on the object or 0 beside it, not "),
    ):
        with pytest.raises(ValueError, match=re.escape(reason)):
            segmenter.segment(embedding, (80, 60), **given)
    box = segmenter.segment(embedding, (80, 60), box=(10, 5, 70, 50))
    other_corners = segmenter.segment(embedding, (80, 60), box=(70, 5, 10, 50))
    np.testing.assert_array_equal(box.mask, other_corners.mask)
    assert box.mask.any()

    with pytest.raises(RuntimeError, match=r"decoder\.onnx is no encoder that takes an image"):
        Segmenter(export, encoder=export / "decoder.onnx")
    with pytest.raises(RuntimeError, match=r"decoder_multimask\.onnx makes all masks of a prompt"):
        Segmenter(export, decoder=export / "decoder_multimask.onnx")
    with pytest.raises(RuntimeError, match="this is no decoder: it has no iou_predictions, but image_embeddings"):
        Segmenter(export, decoder=export / "encoder.onnx")
    model = onnx.load(export / "decoder.onnx")
    onnx.helper.set_model_props(model, {"fingerprint": "0123456789abcdef"})
    onnx.save(model, tmp_path / "decoder.onnx")
    with pytest.raises(RuntimeError, match=r"decoder\.onnx of 0123456789abcdef: not one model"):
        Segmenter(export, decoder=tmp_path / "decoder.onnx")


@pytest.mark.slow
def test_what_the_readme_says_works_as_it_stands(export: Path, predictor: SamPredictor, tmp_path: Path) -> None:
    """Its commands and its code, on a picture that has all the places that these name."""
    export = shutil.copytree(export, tmp_path / "export")
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
