"""The runner of tasks, with edges for a task: contestants, what is kept, kills, processes, bad data."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from distill.evaluate.contestants import contestants_of
from distill.evaluate.kept import Kept
from distill.evaluate.suite import find_task
from distill.recipe import load_recipe
from students import InputError
from support import ROOT, Cli, Layout

TASK = ("recipe=quickstart", "image_size=128", "stage=evaluate", "evaluate.task=edges", "evaluate.thresholds=5")
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def section(run_dir: Path, task: str = "edges") -> dict:
    return json.loads((run_dir / "evaluation.json").read_text())[task]


def kept(run_dir: Path) -> dict[str, list[str]]:
    """Keys by contestant, as they were measured."""
    found: dict[str, list[str]] = {}
    for path in sorted((run_dir / "evaluation" / "edges").glob("*.jsonl")):
        keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
        found.setdefault(path.name.rsplit("-", 2)[0], []).extend(keys)
    return found


def test_contestants_stand_side_by_side_with_their_share_of_the_teacher(
    bsds: Layout, student: Path, tmp_path: Path, cli: Cli
) -> None:
    other = tmp_path / "other.safetensors"
    shutil.copy(student, other)
    arguments = [*TASK, f"evaluate.data={bsds(3)}", f"run_dir={tmp_path / 'out'}", "evaluate.limit=2"]
    alone = cli(*arguments, f"checkpoint={student}")
    assert alone.returncode == 0, alone.stderr
    assert "of the teacher" not in alone.stdout
    assert kept(tmp_path / "out") == {"run": ["0", "1"]}
    result = cli(*arguments, f"checkpoint=[{student}, {other}, teacher]")
    assert result.returncode == 0, result.stderr
    assert kept(tmp_path / "out") == {
        "run": ["0", "1"],
        "other": ["0", "1"],
        "teacher": ["0", "1"],
    }
    numbers = section(tmp_path / "out")["results"]
    assert list(numbers) == ["run", "other", "teacher"]
    assert {name: each["images"] for name, each in numbers.items()} == {"run": 2, "other": 2, "teacher": 2}
    assert numbers["run"]["ODS"] == numbers["other"]["ODS"] < numbers["teacher"]["ODS"]
    for column in ("ODS", "OIS", "AP"):
        share = numbers["run"][column] / numbers["teacher"][column]
        assert numbers["run"]["of_the_teachers"][column] == pytest.approx(share)
    table = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert ["edges", "ODS", "OIS", "AP", "R50"] in table
    assert [
        "run",
        *(f"{numbers['run'][column]:.4f}" for column in ("ODS", "OIS", "AP", "R50")),
        "2",
        "images",
        "(evaluate.limit=2)",
    ] in table
    again = cli(*arguments, f"checkpoint=[{student}, {other}, teacher]")
    assert "evaluation.json is current for edges" in again.stdout
    saved = load_recipe([f"recipe={tmp_path / 'out' / 'recipe.yaml'}"])  # of all stages, and of no task
    assert (saved.stage, saved.checkpoint, saved.evaluate.task) == ("all", None, "masks")


@pytest.mark.slow
def test_a_killed_run_goes_on_and_two_processes_come_to_the_same(
    coco: Callable[..., tuple[Path, Path]], student: Path, tmp_path: Path, cli: Cli
) -> None:
    said = ["evaluate.task=instances", "evaluate.preset=everything", f"evaluate.data={coco(6)[0]}"]
    arguments = [*TASK, *said, f"checkpoint=[{student}, teacher]"]
    whole = cli(*arguments, f"run_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    killed = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "distill.py"), *arguments, f"run_dir={killed}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = killed / "evaluation" / "instances"
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size for path in lines.glob("run-*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (torn,) = lines.glob("run-*.jsonl")
    before = torn.read_text()
    torn.write_text(before + '{"key": "105", "result": {"tru')  # as a disk may leave a line
    done = {json.loads(line)["key"] for line in before.splitlines()}
    assert 0 < len(done) < 6
    resumed = cli(*arguments, f"run_dir={killed}", launcher=TWO)
    assert resumed.returncode == 0, resumed.stderr
    measured = [
        json.loads(line)["key"]
        for path in lines.glob("run-*.jsonl")
        for line in path.read_text().splitlines()
        if line.endswith("}")
    ]
    assert len(measured) == len(set(measured)) == 6  # each once
    assert section(killed, "instances")["results"] == section(tmp_path / "whole", "instances")["results"]


def test_bad_items_are_skipped_counted_and_tried_again(bsds: Layout, student: Path, tmp_path: Path, cli: Cli) -> None:
    root = bsds(3)
    picture = root / "BSDS500/data/images/test/1.png"
    good = picture.read_bytes()
    picture.write_bytes(good[:200])
    arguments = [*TASK, f"evaluate.data={root}", f"checkpoint={student}", f"run_dir={tmp_path / 'out'}"]
    result = cli(*arguments)
    assert result.returncode == 0, result.stderr
    numbers = section(tmp_path / "out")["results"]["run"]
    assert numbers["images"] == 2
    assert list(numbers["skipped"]) == ["1"]
    assert "2 images, 1 skipped: (1×, as in 1): cannot be read: " in result.stdout
    tried = cli(*arguments)
    assert tried.returncode == 0, tried.stderr
    assert "is current" not in tried.stdout  # it may have been the disk
    picture.write_bytes(good)
    mended = cli(*arguments)
    assert mended.returncode == 0, mended.stderr
    numbers = section(tmp_path / "out")["results"]["run"]
    assert (numbers["images"], numbers["skipped"]) == (3, {})
    assert kept(tmp_path / "out")["run"] == ["0", "1", "2", "1", "1"]


def test_nothing_to_measure_is_one_line(bsds: Layout, student: Path, tmp_path: Path, cli: Cli) -> None:
    root = bsds(1)
    (root / "BSDS500/data/images/test/0.png").write_bytes(b"no picture")
    result = cli(*TASK, f"evaluate.data={root}", f"checkpoint={student}", f"run_dir={tmp_path / 'out'}")
    assert result.returncode == 2
    assert "edges: nothing could be measured (1×, as in 0)" in result.stderr
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_changed_file_is_measured_again(bsds: Layout, student: Path, tmp_path: Path, cli: Cli) -> None:
    root = bsds(2)
    arguments = [*TASK, f"evaluate.data={root}", f"checkpoint={student}", f"run_dir={tmp_path / 'out'}"]
    assert cli(*arguments).returncode == 0
    picture = root / "BSDS500/data/images/test/1.png"
    Image.open(picture).convert("L").save(picture)
    assert cli(*arguments).returncode == 0
    assert kept(tmp_path / "out")["run"] == ["0", "1", "1"]
    picture.write_bytes(b"no picture any more")
    assert cli(*arguments).returncode == 0
    numbers = section(tmp_path / "out")["results"]["run"]
    assert (numbers["images"], list(numbers["skipped"])) == (1, ["1"])


def test_names_tell_contestants_apart(student: Path, tmp_path: Path, bsds: Layout) -> None:
    paths = [tmp_path / "a" / "student.safetensors", tmp_path / "b" / "student.safetensors", tmp_path / "c" / "b.pth"]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(b"")
    listed = ", ".join(map(str, [*paths, paths[0]]))
    recipe = load_recipe([*TASK, f"evaluate.data={bsds(1)}", f"checkpoint=[{listed}, teacher]"])
    assert [each.name for each in contestants_of(recipe)] == ["a", "b", "b (2)", "teacher"]
    impostor = tmp_path / "teacher" / "student.safetensors"
    impostor.parent.mkdir()
    impostor.write_bytes(b"")
    recipe = load_recipe([*TASK, f"evaluate.data={bsds(1, 'x')}", f"checkpoint=[{impostor}, teacher]"])
    assert [(each.name, each.path) for each in contestants_of(recipe)] == [("teacher (2)", impostor), ("teacher", None)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stage=all"], "evaluate.task=edges goes with stage=evaluate"),
        (["evaluate.data=null"], "evaluate.task=edges takes one file or folder"),
        (["evaluate.task=edge"], "evaluate.task=edge is not known; did you mean 'edges'?"),
        (["checkpoint=[1, 2]"], "neither text nor a list of texts"),
        (["checkpoint=[]"], "neither text nor a list of texts"),
        (["evaluate.limit=0"], "evaluate.limit=0 is less than 1"),
    ],
)
def test_recipes_that_make_no_sense(arguments: list[str], said: str, tmp_path: Path) -> None:
    given = dict(argument.split("=", 1) for argument in (*TASK, f"evaluate.data={tmp_path}", *arguments))
    with pytest.raises(InputError, match=said.replace("[", r"\[").replace("?", r"\?")):
        load_recipe([f"{key}={value}" for key, value in given.items()])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name
        for name in sys.modules
        if name.startswith(("numba", "distill.evaluate.edges", "distill.evaluate.boundaries"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(InputError, match=r"evaluate\.task=edges needs numba: pip install 'sam-distill\[evaluate\]'"):
        find_task("edges")


def test_other_stages_and_masks_take_one_checkpoint(student: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli(
        "recipe=quickstart", "image_size=128", "stage=export", f"checkpoint=[{student}, teacher]", f"run_dir={tmp_path}"
    )
    assert result.returncode == 2
    assert "stage=export takes one; stage=evaluate compares several" in result.stderr


def test_a_checkpoint_alone_needs_no_recipe(bsds: Layout, student: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli(
        *TASK[2:], f"evaluate.data={bsds(1)}", f"checkpoint=[{student}, teacher]", f"run_dir={tmp_path / 'out'}"
    )
    assert result.returncode == 0, result.stderr
    assert list(section(tmp_path / "out")["results"]) == ["run", "teacher"]


def test_keys_of_any_kind_are_kept(tmp_path: Path) -> None:
    lines = Kept(tmp_path, "name with / and [brackets]", "0123")
    with lines.keeper(0) as keep:
        keep("ünïcode/€", "0a", result={"value": 0.1})
        keep("bad", "5", skipped="why")
    with lines.keeper(1) as keep:
        keep("bad", "5", result={"value": 2})
        keep("bad", "6", skipped="worse")
    assert lines.read() == {
        ("ünïcode/€", "0a"): {"result": {"value": 0.1}},
        ("bad", "5"): {"result": {"value": 2}},
        ("bad", "6"): {"skipped": "worse"},
    }
    assert lines.measured() == {("ünïcode/€", "0a"), ("bad", "5")}
