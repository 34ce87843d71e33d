"""AnyLabeling, X-AnyLabeling and samexporter, as PyPI has them, load the folder that is made for them, each by its own
way to load models: what they make of clicks and boxes is what `SamPredictor` makes of them.

The type `segment_anything` copies every picture into a canvas of 1024 × 684 px first, without antialiasing and with
black around it. There PyTorch looks at the same canvas; how far that is from the picture is said on the terminal (-s).
Students here have drawn weights, or are the toy teacher, whose masks are objects; `efficientvit_sam` takes none but
embeddings of 256 channels, which the toy has not.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
import yaml
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from distill.clients import write_client
from distill.evaluate.ious import mask_iou
from distill.export.encoder import RgbEncoder
from distill.export.onnx import decoder_model, encoder_model, low_res_model, picture_encoder_model
from embeddings_cache.images.scenes import generate_scene
from exports import toy
from students import create_student
from students.sam import untrained_sam

ANYLABELING = ("anylabeling==0.4.43",)
X_ANYLABELING = ("x-anylabeling-cvhub[cpu]==4.2.1",)
SAMEXPORTER = ("--no-deps", "samexporter==0.5.0", "onnxruntime", "opencv-python-headless", "numpy", "pillow")
"""What pip installs. samexporter's other dependencies are for its exports."""

CANVAS = (684, 1024)
"""Height and width."""

PICTURES = {"portrait": (2, 1400, 900), "large": (3, 2200, 3000)}
"""Seed, height, width."""

LABELLING = """
import json, os, sys, time
import numpy as np
from PyQt6.QtGui import QImage
from PyQt6.QtWidgets import QApplication
from anylabeling import config
from anylabeling.services.auto_labeling.model_manager import ModelManager

app = QApplication([])
config.get_default_config()
names = (os.path.join(os.environ["HOME"], name) for name in (".xanylabelingrc", ".anylabelingrc"))
config.current_config_file = next(name for name in names if os.path.exists(name))
manager, said = ModelManager(), []
manager.new_model_status.connect(said.append)
manager.load_custom_model(sys.argv[1])
end = time.time() + 120
while not manager.loaded_model_config and time.time() < end:
    app.processEvents()
    time.sleep(0.05)
assert manager.loaded_model_config, said
model = manager.loaded_model_config["model"]
canvases, masks, answers = [], [], {}

def kept(function, keep):
    def call(*arguments, **options):
        made = function(*arguments, **options)
        keep(made, *arguments)
        return made
    return call

def keep_mask(mask, *_):
    masks.append(np.array(mask).reshape(mask.shape[-2:]))

if hasattr(model, "decoder_model"):
    model.decoder_model.run = kept(model.decoder_model.run, keep_mask)
else:
    model.model.run_encoder = kept(model.model.run_encoder, lambda _, fed: canvases.extend(fed.values()))
    model.model.predict_masks = kept(model.model.predict_masks, keep_mask)

def points_of(shapes):
    parts = [np.array([[point.x(), point.y()] for point in shape.points]) for shape in shapes]
    return np.concatenate([np.column_stack([part, np.full(len(part), i)]) for i, part in enumerate(parts)])

for name, (path, prompts) in json.load(open("asked.json")).items():
    for number, marks in enumerate(prompts):
        model.set_auto_labeling_marks(marks)
        answers[f"{name}_{number}_shapes"] = points_of(model.predict_shapes(QImage(path), path).shapes)
        answers[f"{name}_{number}"] = masks.pop()
    if canvases:
        answers[f"{name}_canvas"] = canvases.pop()
if os.path.exists("expected.npz"):
    for name, logits in np.load("expected.npz").items():
        answers[f"{name}_expected_shapes"] = points_of(model.post_process(logits))
np.savez("answers.npz", **answers)
os._exit(0)  # threads of Qt's
"""
"""Run in a program's environment: loads a YAML file as the program's menu does."""

EXPORTER = """
import json, sys
import cv2
import numpy as np
from samexporter.sam_onnx import SegmentAnythingONNX

model = SegmentAnythingONNX(*sys.argv[1:])
answers = {}
for name, (path, prompts) in json.load(open("asked.json")).items():
    embedding = model.encode(cv2.imread(path))
    for number, marks in enumerate(prompts):
        answers[f"{name}_{number}"] = model.predict_masks(embedding, marks)[0, 0]
np.savez("answers.npz", **answers)
"""

Python = Callable[[tuple[str, ...]], Path]


@dataclass
class Asked:
    """A picture, and prompts as the programs keep them."""

    path: Path
    pixels: np.ndarray
    prompts: list[list[dict[str, Any]]]


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Python:
    """The Python of an environment with some packages; skips where pip cannot install them."""

    @cache
    def made(packages: tuple[str, ...]) -> Path | str:
        directory = tmp_path_factory.mktemp("environment")
        subprocess.run([sys.executable, "-m", "venv", directory], check=True, capture_output=True)
        pip = [directory / "bin" / "python", "-m", "pip", "install", "--quiet", "--prefer-binary", *packages]
        done = subprocess.run(pip, capture_output=True, text=True)
        return directory / "bin" / "python" if not done.returncode else done.stderr.strip().splitlines()[-1]

    def installed(packages: tuple[str, ...]) -> Path:
        found = made(packages)
        if isinstance(found, str):
            pytest.skip(f"pip cannot install {packages}: {found}")
        return found

    return installed


@cache
def sam_of(kind: str) -> Sam:
    if kind == "toy":
        return toy(1024).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return untrained_sam(create_student("repvit_m0_9").eval()).eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`export/anylabeling` of a student."""

    @cache
    def made(kind: str) -> Path:
        directory, sam = tmp_path_factory.mktemp("anylabeling"), sam_of(kind)
        encoder = encoder_model(RgbEncoder(sam.image_encoder).eval())
        onnx.save(picture_encoder_model(encoder, uint8=False), directory / "encoder_hwc.onnx")
        onnx.save(picture_encoder_model(encoder, uint8=True), directory / "encoder_hwc_uint8.onnx")
        onnx.save(decoder_model(low_res_model(sam, single=True)), directory / "decoder.onnx")
        facts = {"name": kind, "title": f"RepViT-M0.9 ({kind})", "fingerprint": "0123abcd", "size": 1024}
        write_client("anylabeling", directory, facts)
        return directory

    return made


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Asked]:
    """Pictures with a click, a click and another beside the object, a box, and a box with a click in it."""
    directory, found = tmp_path_factory.mktemp("pictures"), {}
    for name, (seed, height, width) in PICTURES.items():
        scene, masks = generate_scene(np.random.default_rng(seed), 700)
        largest = max(masks, key=lambda mask: min(mask.mean(), 0.3))
        pixels = cv2.resize(scene, (width, height), interpolation=cv2.INTER_CUBIC)
        object_mask = cv2.resize(largest.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        Image.fromarray(pixels).save(directory / f"{name}.png")
        rows, columns = np.nonzero(object_mask)
        inside = {"type": "point", "data": [int(columns[len(columns) // 2]), int(rows[len(rows) // 2])], "label": 1}
        beside = {"type": "point", "data": [5, 5], "label": 0}
        corners = [int(value) for value in (columns.min(), rows.min(), columns.max(), rows.max())]
        box = {"type": "rectangle", "data": corners}
        prompts = [[inside], [inside, beside], [box], [box, inside]]
        found[name] = Asked(directory / f"{name}.png", pixels, prompts)
    return found


def run(python: Path, script: str, arguments: list[Path], asked: dict[str, Asked], directory: Path) -> dict[str, Any]:
    """What a program answers; its settings go to a home of its own."""
    plain = {name: [str(one.path), one.prompts] for name, one in asked.items()}
    (directory / "asked.json").write_text(json.dumps(plain))
    (directory / "home").mkdir(exist_ok=True)
    settings = {"QT_QPA_PLATFORM": "offscreen", "HOME": str(directory / "home"), "USERPROFILE": str(directory / "home")}
    command = [python, "-c", script, *arguments]
    done = subprocess.run(command, cwd=directory, env={**os.environ, **settings}, capture_output=True, text=True)
    if "libEGL" in done.stderr or "libGL" in done.stderr:
        pytest.skip(f"Qt needs a system library: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return dict(np.load(directory / "answers.npz"))


def logits_of(predictor: SamPredictor, marks: list[dict[str, Any]], scale: float = 1.0) -> np.ndarray:
    """`SamPredictor`'s mask, the best of three for one click; of the image that it was given."""
    clicks = [mark for mark in marks if mark["type"] == "point"]
    boxes = [np.array(mark["data"]) * scale for mark in marks if mark["type"] == "rectangle"]
    masks, ious, _ = predictor.predict(
        point_coords=np.array([mark["data"] for mark in clicks]) * scale if clicks else None,
        point_labels=np.array([mark["label"] for mark in clicks]) if clicks else None,
        box=boxes[0] if boxes else None,
        multimask_output=len(clicks) == 1 and not boxes,
        return_logits=True,
    )
    return masks[ious.argmax()]


def expected_of(sam: Sam, asked: dict[str, Asked], canvases: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PyTorch's logits of every prompt, by picture and number: of a canvas where there is one, and back from it."""
    predictor, found = SamPredictor(sam), {}
    for name, one in asked.items():
        height, width = one.pixels.shape[:2]
        canvas = canvases.get(name)
        scale = 1.0 if canvas is None else min(CANVAS[0] / height, CANVAS[1] / width)
        predictor.set_image(one.pixels if canvas is None else canvas.astype(np.uint8))
        for number, marks in enumerate(one.prompts):
            logits = logits_of(predictor, marks, scale)
            if canvas is not None:
                back = np.array([[1 / scale, 0, 0], [0, 1 / scale, 0]])
                logits = cv2.warpAffine(logits, back, (width, height), flags=cv2.INTER_LINEAR)
            found[f"{name}_{number}"] = logits
    return found


def filled(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Polygons as a mask: x, y and the polygon's number a row."""
    mask = np.zeros(size, np.uint8)
    for number in np.unique(points[:, 2]):
        cv2.fillPoly(mask, [points[points[:, 2] == number, :2].astype(np.int32)], 1)
    return mask > 0


def ious_of(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: mask_iou(found[name] > 0, logits > 0) for name, logits in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packages", "model", "kind"),
    [
        (ANYLABELING, "segment_anything", "toy"),
        (X_ANYLABELING, "segment_anything", "toy"),
        (X_ANYLABELING, "efficientvit_sam", "drawn"),
    ],
    ids=["anylabeling-toy", "x-anylabeling-canvas-toy", "x-anylabeling-drawn"],
)
def test_labelling_programs_make_pytorchs_masks(
    packages: tuple[str, ...],
    model: str,
    kind: str,
    python: Python,
    folder: Callable[[str], Path],
    asked: dict[str, Asked],
    tmp_path: Path,
) -> None:
    command = python(packages), LABELLING, [folder(kind) / f"{model}.yaml"]
    found = run(*command, asked, tmp_path)
    canvases = {name: found[f"{name}_canvas"] for name in asked if f"{name}_canvas" in found}
    assert {canvas.shape for canvas in canvases.values()} == ({(*CANVAS, 3)} if model == "segment_anything" else set())
    expected = expected_of(sam_of(kind), asked, canvases)
    ious = ious_of(found, expected)
    assert min(ious.values()) >= 0.98, ious

    first = dict(list(asked.items())[:1])
    of_first = {name: logits for name, logits in expected.items() if name.split("_")[0] in first}
    np.savez(tmp_path / "expected.npz", **of_first)
    shapes = run(*command, first, tmp_path)
    for name, logits in of_first.items():
        drawn = filled(shapes[f"{name}_shapes"], logits.shape)
        assert mask_iou(drawn, filled(shapes[f"{name}_expected_shapes"], logits.shape)) >= 0.98, name
    if canvases:
        apart = ious_of(found, expected_of(sam_of(kind), asked, {}))
        print(
            f"\n{packages[0]} {model} {kind}: IoU with the whole picture's", {k: round(v, 2) for k, v in apart.items()}
        )


@pytest.mark.slow
def test_samexporter_makes_pytorchs_masks(
    python: Python, folder: Callable[[str], Path], asked: dict[str, Asked], tmp_path: Path
) -> None:
    files = [folder("toy") / "encoder_hwc.onnx", folder("toy") / "decoder.onnx"]
    found = run(python(SAMEXPORTER), EXPORTER, files, asked, tmp_path)
    ious = ious_of(found, expected_of(sam_of("toy"), asked, {}))
    assert min(ious.values()) >= 0.98, ious


def test_files_say_what_the_programs_require(tmp_path: Path) -> None:
    facts = {"name": "repvit_m0_9", "title": 'RepViT "M0.9": ü', "fingerprint": "0123abcd", "size": 1024}
    write_client("anylabeling", tmp_path, facts)
    canvas, whole = (
        yaml.safe_load((tmp_path / f"{name}.yaml").read_text(encoding="ascii"))
        for name in ("segment_anything", "efficientvit_sam")
    )
    assert canvas["type"] == "segment_anything"
    assert (canvas["input_size"], canvas["max_width"], canvas["max_height"]) == (1024, 1024, 1024)
    assert (canvas["encoder_model_path"], canvas["decoder_model_path"]) == ("encoder_hwc.onnx", "decoder.onnx")
    assert (whole["type"], whole["target_size"]) == ("efficientvit_sam", 1024)
    assert (whole["encoder_model_path"], whole["decoder_model_path"]) == ("encoder_hwc_uint8.onnx", "decoder.onnx")
    assert whole["display_name"] == 'RepViT "M0.9": ü'
    assert canvas["name"] != whole["name"]  # X-AnyLabeling keeps models by name
    readme = (tmp_path / "README.md").read_text()
    for name in ("segment_anything.yaml", "efficientvit_sam.yaml", "encoder_hwc.onnx", "encoder_hwc_uint8.onnx"):
        assert name in readme
