"""stage=publish, and checkpoints from the hub, as a user runs them; the hub is one on the loopback."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from distill.recipe import load_recipe
from distill.stages import find_stage
from hub import COMMIT, TOKEN, Hub, hub
from students import InputError
from support import ROOT, TINY, places

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def there() -> Iterator[Hub]:
    with hub() as found:
        yield found


@pytest.fixture
def at_the_hub(there: Hub, tmp_path: Path) -> Run:
    """`distill.py` with that hub, a cache of its own, and no token unless one is given."""
    own = {"HF_ENDPOINT": there.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "distill.py"), *arguments]
        given = {**kept, **own, **environment}
        return subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    """A run of one's own: student, recipe and scores of the shared one."""
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("student.safetensors", "recipe.yaml", "cache.json", "evaluation.json"):
        shutil.copy(finished_run / "run" / name, copy)
    return copy


def test_a_dry_run_says_all_and_sends_nothing(at_the_hub: Run, there: Hub, run_dir: Path) -> None:
    done = at_the_hub("stage=publish", f"run_dir={run_dir}", "repo=me/tiny", "dry_run=true")
    assert done.returncode == 0, done.stderr
    folder = run_dir / "export" / "huggingface"
    files = sorted(path for path in folder.iterdir())
    assert f"publish: would send {len(files)} files" in done.stdout
    assert f"to {there.address}/me/tiny (private, if it is new)" in done.stdout
    for file in files:
        assert f"{hashlib.sha256(file.read_bytes()).hexdigest()} {file.stat().st_size:>12,} {file.name}" in done.stdout
    assert "does not say yet under which licence" in done.stdout
    assert there.requests == []


def test_what_is_sent_is_the_folder_as_it_was_edited(at_the_hub: Run, there: Hub, run_dir: Path) -> None:
    arguments = ("stage=publish", f"run_dir={run_dir}", "repo=me/tiny")
    assert at_the_hub(*arguments, "dry_run=true").returncode == 0
    folder = run_dir / "export" / "huggingface"
    card = folder / "README.md"
    card.write_text(card.read_text().replace("license: other\nlicense_name: to-be-filled-in", "license: apache-2.0"))
    done = at_the_hub(*arguments, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"{there.address}/me/tiny/commit/{COMMIT}" in done.stdout
    assert "licence" not in done.stdout
    assert {name: content for (_, name), content in there.files.items()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert there.created["me/tiny"].get("visibility", "private") == "private"
    assert there.created["me/tiny"].get("private", True)


def test_what_cannot_be_sent_is_a_line(at_the_hub: Run, there: Hub, run_dir: Path) -> None:
    def refused(*arguments: str, **environment: str) -> str:
        done = at_the_hub("stage=publish", f"run_dir={run_dir}", *arguments, **environment)
        assert done.returncode == 2, done.stdout
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("distill.py: ")]
        assert "Traceback" not in done.stderr
        return line.removeprefix("distill.py: ")

    for arguments, reason in (
        ((), "stage=publish needs repo=OWNER/NAME"),
        (("repo=tiny",), "repo=tiny is not OWNER/NAME"),
    ):
        with pytest.raises(InputError, match=reason):
            find_stage("publish").check(load_recipe([f"run_dir={run_dir}", "stage=publish", *arguments]), ())
    assert refused("repo=me/tiny").startswith("stage=publish needs your token: hf auth login, or HF_TOKEN")
    assert there.requests == []
    assert not (run_dir / "export").exists()
    assert refused("repo=me/tiny", HF_TOKEN="hf_of_nobody").startswith(f"{there.address}/me/tiny did not take it")
    assert there.files == {}
    far = refused("repo=me/tiny", HF_TOKEN=TOKEN, HF_ENDPOINT="http://127.0.0.1:9")
    assert far.startswith("stage=publish: http://127.0.0.1:9 does not answer")


def test_a_checkpoint_from_the_hub_goes_by_its_address(at_the_hub: Run, there: Hub, run_dir: Path) -> None:
    there.files["me/tiny", "student.safetensors"] = (run_dir / "student.safetensors").read_bytes()
    address = "hf://me/tiny/student.safetensors"
    export = ("stage=export", f"checkpoint={address}", "export.formats=[onnx]", "run_dir=from_hub")
    done = at_the_hub(*export)
    assert done.returncode == 0, done.stderr
    saved = run_dir.parent / "from_hub" / "recipe.yaml"
    assert yaml.safe_load(saved.read_text())["checkpoint"] == f"{address}@{COMMIT}"
    again = at_the_hub(*export, HF_HUB_OFFLINE="1")
    assert "is current" in again.stdout
    none = at_the_hub("stage=export", "checkpoint=hf://me/tiny/none.pt", "export.formats=[onnx]")
    assert none.returncode == 2
    assert none.stderr.splitlines()[-1] == "distill.py: hf://me/tiny/none.pt: me/tiny has no file none.pt"


@pytest.mark.slow
def test_a_student_that_starts_from_the_hub_trains_on_without_it(
    at_the_hub: Run, there: Hub, run_dir: Path, finished_run: Path
) -> None:
    """Its recipe keeps the address, with the commit; a run that has begun needs neither hub nor cache."""
    there.files["me/tiny", "student.safetensors"] = (run_dir / "student.safetensors").read_bytes()
    data = places(finished_run, yaml.safe_load((run_dir / "recipe.yaml").read_text())["data"]["images"])
    train = (*TINY, *data[::2], "run_dir=tuned", "stage=train", "train.epochs=1", "train.checkpoint_every=1")
    done = at_the_hub(*train, "student.start=hf://me/tiny/student.safetensors")
    assert done.returncode == 0, done.stderr
    saved = run_dir.parent / "tuned" / "recipe.yaml"
    assert yaml.safe_load(saved.read_text())["student"]["start"] == f"hf://me/tiny/student.safetensors@{COMMIT}"
    shutil.rmtree(run_dir.parent / "home")
    again = at_the_hub("stage=train", "run_dir=tuned", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
