"""A student at half the pixels through every stage, and what its receiver makes of the folder."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segment_anything import SamPredictor

from distill.evaluate.ious import mask_iou
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.teacher.loading import load_teacher
from students import build_student_sam, load_student
from support import TINY, Cli, places

HALF = ("student.neck=pyramid", "student.neck_depth=1", "student.input_size=64", "train.epochs=12")
STUDENT = ("student.name=efficientvit_l1", "student.overrides={widths: [8, 16, 32, 64, 64], depths: [1, 1, 1, 1, 1]}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, scene_tar: Path, cli: Cli) -> Path:
    """`stage=all`; its encoders take 64 px, and all that they are asked is of 128."""
    directory = tmp_path_factory.mktemp("half")
    exports = ("export.input=native", "export.formats=[onnx, onnx_fp16, onnx_decoder, coreml]")
    result = cli(*TINY, *places(directory, scene_tar), *STUDENT, *HALF, *exports)
    assert result.returncode == 0, result.stderr
    return directory / "run"


@pytest.mark.slow
def test_every_stage_takes_it(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())["masks"]
    assert evaluation["miou"]["box"]["all"]["student_teacher"] > 0.25
    manifest = json.loads((run / "export" / "manifest.json").read_text())
    assert (manifest["student"]["image_size"], manifest["student"]["input_size"]) == (128, 64)
    assert manifest["student"]["mask_miou_with_whole_images"] > 0.9
    (package,) = (name for name in manifest["files"] if name.endswith("Encoder.mlpackage"))
    for name in ("encoder.onnx", "encoder_fp16.onnx", package):
        assert manifest["files"][name]["inputs"]["image"]["shape"] == [1, 3, 64, 64]
        assert manifest["files"][name]["outputs"]["image_embeddings"]["shape"] == [1, 128, 8, 8]
    assert (run / "report" / "index.html").stat().st_size > 0


@pytest.mark.slow
def test_the_receivers_code_resizes_once_and_gets_the_same_mask(run: Path) -> None:
    export = run / "export"
    scene, masks = generate_scene(np.random.default_rng(3), 300)
    Image.fromarray(scene).save(export / "photo.png")
    y, x = (int(places.mean()) for places in np.nonzero(max(masks, key=np.sum)))
    command = [sys.executable, "segment.py", "photo.png", f"{x},{y}"]
    subprocess.run(command, cwd=export, check=True, capture_output=True, timeout=120)
    found = np.asarray(Image.open(export / "mask.png"))

    student = load_student(run / "student.safetensors")
    predictor = SamPredictor(build_student_sam(student, load_teacher("toy", None, 128)))
    predictor.set_image(scene)
    expected, ious, _ = predictor.predict(np.array([[x, y]]), np.array([1]))
    assert found.any()
    assert mask_iou(found > 0, expected[ious.argmax()]) > 0.85
