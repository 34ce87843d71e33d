import json
from dataclasses import replace
from pathlib import Path

import pytest

from distill.main import run
from distill.recipe import Recipe, load_recipe
from distill.run import note_time, stage_times
from students import InputError


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(["recipe=quickstart", f"run_dir={tmp_path}"])


def test_interrupted_attempts_count(recipe: Recipe) -> None:
    note_time(recipe, "train", 10.0, finished=False)
    note_time(recipe, "train", 5.0, finished=False)
    note_time(recipe, "train", 2.04, finished=True)
    assert json.loads((Path(recipe.run_dir) / "stages.json").read_text()) == {
        "train": {"seconds": 17.0, "finished": True}
    }


def test_a_stage_done_anew_starts_from_nothing(recipe: Recipe) -> None:
    note_time(recipe, "evaluate", 10.0, finished=True)
    note_time(recipe, "export", 1.0, finished=True)
    note_time(recipe, "evaluate", 4.0, finished=True)
    assert {stage: entry["seconds"] for stage, entry in stage_times(recipe).items()} == {"evaluate": 4.0, "export": 1.0}


def test_a_stage_that_fails_leaves_its_time_and_its_error(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"<html>gone</html>" * 1000)
    recipe = replace(recipe, stage="precompute", cache=replace(recipe.cache, dir=str(tmp_path / "cache")))
    recipe.data = replace(recipe.data, images=str(tmp_path / "bad.tar"))
    with pytest.raises(InputError, match=r"cannot read .*bad\.tar"):
        run(recipe)
    assert stage_times(recipe)["precompute"]["finished"] is False


def test_a_failed_second_attempt_changes_nothing(recipe: Recipe) -> None:
    note_time(recipe, "train", 10.0, finished=True)
    note_time(recipe, "train", 1.0, finished=False)
    assert stage_times(recipe) == {"train": {"seconds": 10.0, "finished": True}}
