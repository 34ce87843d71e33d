"""Small real files that the tests share: a tar of generated scenes, and one finished run of the whole pipeline."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from embeddings_cache.scenes import write_scene_tar

ROOT = Path(__file__).parents[1]
IMAGES = 24
TINY = (
    "recipe=quickstart",
    "image_size=128",
    "data.val_images=4",
    "train.epochs=2",
    "train.batch_size=4",
    "student.overrides={widths: [8, 16, 24, 32], depths: [1, 1, 1, 1]}",
    "teacher.batch_size=4",
    "train.workers=1",
)
"""A recipe that runs every stage in seconds; `data.images`, `run_dir` and `cache.dir` are still to be given."""

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def scene_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SA-1B-style tar of 24 generated scenes, 160 px on the longest side."""
    path = tmp_path_factory.mktemp("scenes") / "sa_000000.tar"
    write_scene_tar(path, range(IMAGES), longest_side=160)
    return path


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run `distill.py` as a user does, in a process of its own; `launcher` goes before it."""

    def run(*arguments: str, launcher: tuple[str, ...] = (), cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *launcher, str(ROOT / "distill.py"), *arguments]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, scene_tar: Path, cli: Cli) -> Path:
    """A directory with `run/` and `cache/` of one run of all stages."""
    directory = tmp_path_factory.mktemp("finished")
    result = cli(*TINY, *places(directory, scene_tar))
    assert result.returncode == 0, result.stderr
    return directory


def places(directory: Path, images: Path | str) -> tuple[str, str, str]:
    """The arguments that keep a run within a directory."""
    return f"data.images={images}", f"run_dir={directory / 'run'}", f"cache.dir={directory / 'cache'}"
