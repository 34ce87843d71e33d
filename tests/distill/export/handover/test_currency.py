"""A converted TinyViT-5M is currency: programs that take MobileSAM's `mobile_sam.pt` take ours. Each runs in a process
and a virtual environment of its own, without network; `SamPredictor` around the student says what it has to come to."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.utils.transforms import ResizeLongestSide

from distill.evaluate.ious import mask_iou
from distill.export.onnx.file import open_session
from distill.main import main
from embeddings_cache.images.scenes import generate_scene
from students import build_student_sam, create_student, load_checkpoint, load_student, save_published, save_student
from students.sam import untrained_sam

SIZES = {"unresized": (683, 1024), "reduced": (1200, 800)}
"""Height and width of the pictures."""

PROMPTS: dict[str, dict[str, Any]] = {
    "clicks": {"points": [(0.3, 0.4), (0.7, 0.6)], "labels": [1, 0]},
    "box": {"box": [(0.2, 0.2), (0.8, 0.7)]},
    "clicks in a box": {"points": [(0.4, 0.5), (0.7, 0.6)], "labels": [1, 0], "box": [(0.2, 0.2), (0.8, 0.7)]},
}
"""Places are parts of the width and of the height. All are tried on the first picture, the first on both."""

OFFLINE = """
import socket

def refuse(*arguments, **options):
    raise OSError("there is no network")

socket.getaddrinfo = socket.socket.connect = refuse
"""

ULTRALYTICS = """
from ultralytics import SAM

model = SAM("mobile_sam.pt")

def segment(image, points, labels, box):
    prompts = {"points": points and [points], "labels": labels and [labels], "bboxes": box and [box]}
    return model(image, verbose=False, **prompts)[0].masks.data[0].numpy()
"""

MOBILE_SAM = """
import cv2
from mobile_sam import SamPredictor, sam_model_registry

sam = sam_model_registry["vit_t"](checkpoint="mobile_sam.pt")
sam.to(device="cpu")
predictor = SamPredictor(sam)

def segment(image, points, labels, box):
    predictor.set_image(cv2.cvtColor(cv2.imread(image), cv2.COLOR_BGR2RGB))
    points, labels, box = (given and np.array(given, dtype=np.float32) for given in (points, labels, box))
    masks, _, _ = predictor.predict(point_coords=points, point_labels=labels, box=box, multimask_output=False)
    return masks[0]
"""
"""What Label Studio's example does (label-studio-ml-backend, examples/segment_anything_model/sam_predictor.py)."""

SAMEXPORTER_IN_EVAL_MODE = """
from samexporter import export_decoder, export_encoder

build = export_encoder.setup_model
export_encoder.setup_model = lambda: build().eval()
export_encoder.run_export("mobile", "mobile_sam.pt", "encoder.onnx", use_preprocess=True, opset=18)
export_decoder.run_export("mobile", "mobile_sam.pt", "decoder.onnx", return_single_mask=True, opset=18)
"""

SAMEXPORTER = """
import cv2
from samexporter.sam_onnx import SegmentAnythingONNX

model = SegmentAnythingONNX("encoder.onnx", "decoder.onnx")

def segment(image, points, labels, box):
    prompt = [{"type": "point", "data": point, "label": label} for point, label in zip(points, labels)]
    return model.predict_masks(model.encode(cv2.imread(image)), prompt)[0, 0] > 0
"""

ANSWER = """
import json
import numpy as np

with open("questions.json") as file:
    np.savez("answers.npz", *[segment(**question) for question in json.load(file)])
"""


@dataclass(frozen=True)
class Question:
    """A picture, and a prompt in its pixels: clicks (x, y), 1 or 0 for each, a box (x0, y0, x1, y1)."""

    image: str
    points: list[list[int]] | None
    labels: list[int] | None
    box: list[int] | None

    def pixels(self) -> np.ndarray:
        with Image.open(self.image) as picture:
            return np.asarray(picture)


@dataclass(frozen=True)
class Answer:
    """A boolean mask (H, W), the logits (256, 256) that it was made of, and the embedding (1, 256, 64, 64)."""

    mask: np.ndarray
    low_res: np.ndarray
    embedding: np.ndarray


Install = Callable[..., Path]


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Install:
    """Make a virtual environment with some packages, and say where its Python is. What they need is found in this one,
    so that PyTorch is not installed again."""

    def make(*packages: str) -> Path:
        directory = tmp_path_factory.mktemp("venv")
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True, timeout=100)
        python = directory / "bin" / "python"
        where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        own = subprocess.run(where, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
        ours = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        Path(own, "ours.pth").write_text("\n".join(ours))
        command = [str(python), "-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--retries=1", *packages]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            pytest.skip(f"pip cannot install {' '.join(packages)}: {' '.join(errors)}")
        return python

    return make


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`export/mobile_sam.pt`, and what it was made of: `student.safetensors` and `teacher.pt`."""
    directory = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    decoder = untrained_sam(torch.nn.Identity())
    # ultralytics leaves out a mask whose predicted IoU is at most 0.25.
    torch.nn.init.constant_(decoder.mask_decoder.iou_prediction_head.layers[-1].bias, 0.9)
    save_published(directory / "teacher.pt", create_student("repvit_m0_9"), decoder)
    student = create_student("tiny_vit_5m")
    student(torch.randn(2, 3, 64, 64))  # moves the batch statistics away from their start
    save_student(directory / "student.safetensors", student, {})
    arguments = ["recipe=tiny_vit_5m", f"teacher.checkpoint={directory / 'teacher.pt'}", f"run_dir={directory}"]
    assert main([*arguments, f"checkpoint={directory / 'student.safetensors'}", "stage=convert"]) == 0
    return directory


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    """Pictures with prompts."""
    directory = tmp_path_factory.mktemp("pictures")
    asked: list[Question] = []
    for name, (height, width) in SIZES.items():
        pixels, _ = generate_scene(np.random.default_rng(5), 8 * max(height, width) // 5)
        picture = directory / f"{name}.png"
        Image.fromarray(pixels[:height, :width]).save(picture)
        for prompt in list(PROMPTS.values())[: 1 if asked else None]:
            points, corners = (
                [[int(x * width), int(y * height)] for x, y in prompt.get(kind, [])] for kind in ("points", "box")
            )
            box = [side for corner in corners for side in corner]
            asked.append(Question(str(picture), points or None, prompt.get("labels"), box or None))
    return asked


@pytest.fixture(scope="module")
def expected(run_dir: Path, questions: list[Question]) -> list[Answer]:
    """The student's own answers."""
    student, teacher = load_student(run_dir / "student.safetensors"), load_checkpoint(run_dir / "teacher.pt")
    predictor = SamPredictor(build_student_sam(student, teacher))
    found = []
    for before, question in zip([None, *questions], questions, strict=False):
        if before is None or before.image != question.image:
            predictor.set_image(question.pixels())
        prompt = {"point_coords": question.points, "point_labels": question.labels, "box": question.box}
        arrays = {name: value and np.array(value) for name, value in prompt.items()}
        masks, _, low_res = predictor.predict(**arrays, multimask_output=False)
        assert 0.1 < masks[0].mean() < 0.9
        found.append(Answer(masks[0], low_res[0], predictor.get_image_embedding().numpy()))
    return found


@pytest.fixture
def place(run_dir: Path, tmp_path: Path) -> Path:
    """Where a program works: beside the converted file, which has the name that it knows."""
    (tmp_path / "mobile_sam.pt").symlink_to(run_dir / "export" / "mobile_sam.pt")
    return tmp_path


def run_program(python: Path, *arguments: str, place: Path) -> None:
    settings = {"YOLO_CONFIG_DIR": str(place), "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    command = [str(python), "-W", "ignore", *arguments]
    environment = {**os.environ, **settings, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def answers(python: Path, segment: str, questions: list[Question], place: Path) -> list[np.ndarray]:
    """The boolean masks (H, W) that a program's `segment` makes."""
    (place / "questions.json").write_text(json.dumps([asdict(question) for question in questions]))
    (place / "program.py").write_text(OFFLINE + segment + ANSWER)
    run_program(python, "program.py", place=place)
    with np.load(place / "answers.npz") as found:
        return [found[f"arr_{number}"].astype(bool) for number in range(len(questions))]


def resized_at_once(low_res: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mask (height, width) of low-resolution logits by one interpolation, where SAM has two, by way of 1024 px."""
    scale = 1024 / max(height, width)
    y, x = (
        (2 * torch.arange(side) + 1) * (round(side * scale) / 1024 / side) - 1  # pixels' centres, -1 ... 1
        for side in (height, width)
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    logits = F.grid_sample(
        torch.from_numpy(low_res)[None, None], grid[None], padding_mode="border", align_corners=False
    )
    return logits[0, 0].numpy() > 0


@pytest.mark.slow
def test_ultralytics(install: Install, questions: list[Question], expected: list[Answer], place: Path) -> None:
    """It resizes SAM's masks at once, which shows at their edges, and these drawn masks are all edge. It also pads with
    grey 114, and does not smooth what it makes smaller."""
    python = install("ultralytics==8.4.190")
    for found, ours in zip(answers(python, ULTRALYTICS, questions, place), expected, strict=True):
        height, width = ours.mask.shape
        assert mask_iou(found, resized_at_once(ours.low_res, height, width)) > 0.98
        assert mask_iou(found, ours.mask) > (0.98 if max(height, width) == 1024 else 0.9)


@pytest.mark.slow
def test_mobile_sam_and_label_studio(
    install: Install, questions: list[Question], expected: list[Answer], place: Path
) -> None:
    """With MobileSAM's own package; on the registry it goes by another name, file by file the publisher's."""
    python = install("mobilesam-mirror==1.0.0")
    for found, ours in zip(answers(python, MOBILE_SAM, questions, place), expected, strict=True):
        assert mask_iou(found, ours.mask) > 0.999


@pytest.mark.slow
def test_samexporter(install: Install, questions: list[Question], expected: list[Answer], place: Path) -> None:
    """Its files make our embedding and, of clicks, our masks; beside a box it gives the decoder a padding point, which
    `SamPredictor` does not.

    That is so in eval mode. Its command tries the encoder in training mode before it exports it, with noise, which
    moves the batch statistics, whoever wrote the file.
    """
    python = install("samexporter==0.5.0")
    (place / "export.py").write_text(OFFLINE + SAMEXPORTER_IN_EVAL_MODE)
    run_program(python, "export.py", place=place)
    command = ["-m", "samexporter.export_encoder", "--checkpoint", "mobile_sam.pt", "--model-type", "mobile"]
    run_program(python, *command, "--output", "command.onnx", "--use-preprocess", place=place)

    clicks, ours = zip(*(pair for pair in zip(questions, expected, strict=True) if not pair[0].box), strict=True)
    embeddings = [embed(place / "encoder.onnx", question) for question in clicks]
    for embedding, answer in zip(embeddings, ours, strict=True):
        np.testing.assert_allclose(embedding, answer.embedding, atol=1e-4)
    assert np.abs(embed(place / "command.onnx", clicks[0]) - ours[0].embedding).max() > 0.1
    for found, answer in zip(answers(python, SAMEXPORTER, list(clicks), place), ours, strict=True):
        assert mask_iou(found, answer.mask) > 0.999


def embed(encoder: Path, question: Question) -> np.ndarray:
    resized = ResizeLongestSide(1024).apply_image(question.pixels())
    (embedding,) = open_session(encoder).run(None, {"input_image": resized.astype(np.float32)})
    return embedding
