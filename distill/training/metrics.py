"""Where the numbers of a run go while it trains."""

import json
import time
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object
from omegaconf import OmegaConf

from distill.recipe import Recipe
from distill.run import read_metrics
from distill.training.batches import TimedBatches
from embeddings_cache.system import whole_file
from students import InputError


class Metrics:
    """`metrics.jsonl` and the recipe's trackers, from the main process.

    A resumed run goes on behind the step that it resumes from; `scored` says whether that has its validation's line.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, resumed_step: int) -> None:
        self.path, self.accelerator = Path(recipe.run_dir) / "metrics.jsonl", accelerator
        # To TensorBoard alone the name is that of a folder in the run directory; to others that of a project.
        name = "tensorboard" if recipe.train.trackers == ["tensorboard"] else "sam-distill"
        accelerator.init_trackers(name, tracked_settings(recipe), {"tensorboard": {"purge_step": resumed_step + 1}})
        kept = [line for line in read_metrics(self.path.parent) if resumed_step and line["step"] <= resumed_step]
        scored = any(line["step"] == resumed_step and "val_mse" in line for line in kept)
        self.scored: bool = gather_object([scored])[0]
        if accelerator.is_main_process:
            with whole_file(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Append one line."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")


class Pace:
    """How fast a run is, between laps: images a second, and the share of the time that went into waiting for data."""

    def __init__(self, batches: TimedBatches, images_a_step: int, step: int) -> None:
        self.batches, self.images_a_step = batches, images_a_step
        self.began, self.step, self.waited = time.perf_counter(), step, batches.waited

    def lap(self, step: int) -> dict[str, float]:
        """`images_per_second` and `loader_wait` since the last lap, which ends here."""
        now, waited = time.perf_counter(), self.batches.waited
        spent = now - self.began
        rate = (step - self.step) * self.images_a_step / spent
        share = (waited - self.waited) / spent
        self.began, self.step, self.waited = now, step, waited
        return {"images_per_second": rate, "loader_wait": share}

    def leave_out(self, seconds: float) -> None:
        """Do not count what was no training: validation, a checkpoint."""
        self.began += seconds


def tracked_settings(recipe: Recipe) -> dict[str, int | float | str | bool]:
    """The recipe, flat, in the types that every tracker takes."""
    flat: dict[str, int | float | str | bool] = {}

    def flatten(values: dict, prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                flatten(value, f"{prefix}{name}.")
            else:
                flat[f"{prefix}{name}"] = value if isinstance(value, int | float | str | bool) else str(value)

    flatten(OmegaConf.to_container(OmegaConf.structured(recipe)), "")  # type: ignore[arg-type]
    return flat


def check_trackers(recipe: Recipe) -> None:
    """Raise `InputError` where a tracker's package is not installed."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in recipe.train.trackers:
        if name not in available:
            raise InputError(f"train.trackers: {name} is not installed: pip install {name.replace('_', '-')}")
