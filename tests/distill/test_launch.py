"""What `train.mixed_precision=auto` comes to."""

from pathlib import Path

import pytest
import torch

from distill.launch import create_accelerator, settle_precision
from distill.recipe import load_recipe, saved_recipe
from distill.run import claim_run_dir


def settled(*arguments: str, trains: bool = True) -> str:
    recipe = load_recipe(["recipe=quickstart", "data.images=x", *arguments])
    settle_precision(recipe, trains)
    claim_run_dir(recipe)  # refuses what would train another student
    return recipe.train.mixed_precision


def test_what_is_asked_for_stays(tmp_path: Path) -> None:
    for precision in ("no", "bf16", "fp16"):
        assert settled(f"run_dir={tmp_path / precision}", f"train.mixed_precision={precision}") == precision


def test_a_run_that_has_begun_keeps_its_own(tmp_path: Path) -> None:
    """Whatever the machine; also one that was begun before there was `auto`, whose recipe says no."""
    for precision in ("no", "bf16"):
        place = f"run_dir={tmp_path / precision}"
        settled(place, f"train.mixed_precision={precision}")
        (tmp_path / precision / "checkpoints").mkdir()
        assert settled(place) == settled(place, trains=False) == precision


def test_a_student_that_nothing_is_known_of_is_no_reason_to_stop(tmp_path: Path) -> None:
    """Somebody has copied it there, and another stage than train has left a recipe beside it."""
    place = f"run_dir={tmp_path}"
    (tmp_path / "student.safetensors").touch()
    assert settled(place, trains=False) == "auto"
    recipe = load_recipe(["recipe=quickstart", "data.images=x", "stage=train", place])
    assert create_accelerator(recipe).mixed_precision == "no"


def test_on_a_cpu_there_is_none(tmp_path: Path) -> None:
    """The tests say ACCELERATE_USE_CPU."""
    place = f"run_dir={tmp_path / 'run'}"
    assert settled(place, trains=False) == "auto"  # whoever trains decides
    assert settled(place) == "no"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_bfloat16_where_the_gpu_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    has_it = torch.cuda.get_device_capability() >= (8, 0)
    assert settled(f"run_dir={tmp_path / 'run'}") == ("bf16" if has_it else "no")


def test_a_runs_recipe_says_what_it_came_to(finished_run: Path) -> None:
    assert saved_recipe(finished_run / "run" / "recipe.yaml").train.mixed_precision == "no"
