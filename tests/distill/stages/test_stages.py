"""What holds for every stage, and what it takes to add one."""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distill.recipe import load_recipe
from distill.schema import ON_REQUEST, STAGES
from distill.stages import Stage, find_stage
from students import InputError
from support import ROOT, TINY, places

TOY_STAGE = """
from collections.abc import Collection
from pathlib import Path

from accelerate import Accelerator

from distill.recipe import Recipe
from students import InputError


def check(recipe: Recipe, before: Collection[str]) -> None:
    if recipe.seed == 13:
        raise InputError("a toy does not like 13")


def run(recipe: Recipe, accelerator: Accelerator) -> bool:
    (Path(recipe.run_dir) / "toy.txt").write_text("played")
    return True
"""


@pytest.mark.parametrize("name", [*STAGES, *ON_REQUEST])
def test_a_stage_says_what_it_needs_and_what_it_does(name: str) -> None:
    stage = find_stage(name)
    for function in ("check", "run"):
        found, expected = (inspect.signature(getattr(each, function)) for each in (stage, Stage))
        assert list(found.parameters) == list(expected.parameters)[1:]
        assert getattr(stage, function).__doc__
    assert stage.__doc__


@pytest.mark.parametrize(
    ("name", "before", "missing"),
    [
        ("train", ("precompute",), "cache at .* does not exist: run stage=precompute"),
        ("evaluate", ("precompute", "train"), "no student at .*: run stage=train first"),
        ("export", ("train",), "no student at .*: run stage=train first"),
        ("report", ("train", "evaluate"), "no student at .*: run stage=train first"),
        ("convert", ("train",), "no student at .*: run stage=train first"),
    ],
)
def test_what_comes_before_is_not_missing_yet_and_nothing_is_written(
    name: str, before: tuple[str, ...], missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe([*TINY, *places(tmp_path, "scenes:8")])
    find_stage(name).check(recipe, before)
    with pytest.raises(InputError, match=missing):
        find_stage(name).check(recipe, ())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_stage_is_added_by_a_file_and_a_line(tmp_path: Path) -> None:
    """In a copy of the house."""
    for package in ("distill", "embeddings_cache", "students", "recipes"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "distill.py", tmp_path)
    (tmp_path / "distill" / "stages" / "toy.py").write_text(TOY_STAGE)
    table = tmp_path / "distill" / "schema.py"
    line = next(line for line in table.read_text().splitlines() if line.startswith("ON_REQUEST"))
    table.write_text(table.read_text().replace(line, line.replace("(", '("toy", ', 1)))

    def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "distill.py", "recipe=quickstart", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    assert "on request: toy, inspect, verify" in cli("--help").stdout
    played = cli("stage=toy", "run_dir=run")
    assert played.returncode == 0, played.stderr
    assert (tmp_path / "run" / "toy.txt").read_text() == "played"
    refused = cli("stage=toy", "run_dir=refused", "seed=13")
    assert (refused.returncode, refused.stderr) == (2, "distill.py: a toy does not like 13\n")
    assert not (tmp_path / "refused").exists()
