"""Where the numbers of a run go while it trains."""

import json
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from omegaconf import OmegaConf

from distill.recipe import Recipe
from distill.run import read_metrics
from embeddings_cache.files import whole_file
from students import InputError


class Metrics:
    """`metrics.jsonl` and the recipe's trackers, from the main process.

    A resumed run goes on behind the step that it resumes from.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, resumed_step: int) -> None:
        self.path, self.accelerator = Path(recipe.run_dir) / "metrics.jsonl", accelerator
        # To TensorBoard alone the name is that of a folder in the run directory; to others that of a project.
        name = "tensorboard" if recipe.train.trackers == ["tensorboard"] else "sam-distill"
        accelerator.init_trackers(name, tracked_settings(recipe), {"tensorboard": {"purge_step": resumed_step + 1}})
        if accelerator.is_main_process:
            kept = [line for line in read_metrics(self.path.parent) if resumed_step and line["step"] <= resumed_step]
            with whole_file(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Append one line."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")


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
