"""An export as its receiver has it: a student that knows these pictures by heart, its folder, and nothing else."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from segment_anything import SamPredictor
from torch.nn.functional import mse_loss

from embeddings_cache.images.decoding import decode_image
from embeddings_cache.images.preprocessing import pad_pixels, resize_longest_side, to_encoder_input
from exports import SIZE, small_student, toy
from npm import npm_install
from programs import pictures
from students import StudentEncoder, build_student_sam, read_metadata, save_student
from support import Cli


@pytest.fixture(scope="session")
def student() -> StudentEncoder:
    """A student that has learnt these pictures by heart, in seconds: drawn weights make empty masks."""
    student = small_student().requires_grad_(True).train()
    pixels = [resize_longest_side(decode_image(content), SIZE) for content in pictures().values()]
    padded = torch.stack([pad_pixels(each, SIZE) for each in pixels])
    images = to_encoder_input(padded, torch.tensor([each.shape[:2] for each in pixels]))
    with torch.no_grad():
        embeddings = toy().image_encoder(images)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        mse_loss(student(images), embeddings).backward()
        optimizer.step()
    return student.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def predictor(student: StudentEncoder) -> SamPredictor:
    return SamPredictor(build_student_sam(student, toy()).eval())


@pytest.fixture(scope="session")
def export(student: StudentEncoder, finished_run: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `stage=export` hands over, moved to a place where nothing else is."""
    made = tmp_path_factory.mktemp("made")
    save_student(made / "s.safetensors", student, read_metadata(finished_run / "run" / "student.safetensors"))
    result = cli("stage=export", "checkpoint=s.safetensors", "export.formats=[onnx, onnx_decoder]", cwd=made)
    assert result.returncode == 0, result.stderr
    return Path(shutil.move(made / "runs" / "s" / "export", tmp_path_factory.mktemp("received") / "export"))


@pytest.fixture(scope="session")
def folder(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same with what `npm install` brings."""
    place = tmp_path_factory.mktemp("programs") / "export"
    shutil.copytree(export, place)
    npm_install(place)
    yield place
    shutil.rmtree(place)  # half a gigabyte
