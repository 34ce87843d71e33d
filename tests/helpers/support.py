"""What several test files need by name."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
"""A browser, where there is one."""
IMAGES = 24
"""Scenes in the shared tar."""

TINY = (
    "recipe=quickstart",
    "image_size=128",
    "data.val_images=4",
    "train.epochs=2",
    "train.loss={mse: 1}",
    "train.batch_size=4",
    "student.overrides={widths: [8, 16, 24, 32], depths: [1, 1, 1, 1]}",
    "teacher.batch_size=4",
    "train.workers=1",
    "export.formats=[onnx]",
    "export.images=2",
)
"""A recipe that runs every stage in seconds; `data.images`, `run_dir` and `cache.dir` are still to be given."""

Cli = Callable[..., subprocess.CompletedProcess[str]]
Layout = Callable[..., Path]
"""Writes a data set as it is officially laid out, and says where."""


def places(directory: Path, images: Path | str) -> tuple[str, str, str]:
    """The arguments that keep a run within a directory."""
    return f"data.images={images}", f"run_dir={directory / 'run'}", f"cache.dir={directory / 'cache'}"
