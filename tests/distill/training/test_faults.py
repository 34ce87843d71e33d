"""Training is killed, stopped, spread over processes, and its checkpoints are damaged."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from caches import flip_a_bit
from distill.evaluate.masks import evaluate_masks
from distill.launch import create_accelerator
from distill.recipe import Recipe, load_recipe
from distill.train import train
from students import InputError, load_student
from support import ROOT, TINY, Cli, places

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

SETTINGS = (
    *TINY,
    "stage=train",
    "train.epochs=1",
    "train.then=[{loss: {mse: 1, mask: 0.5}}, {loss: {mask_bce: 5, mask_dice: 5}, lr: 0.001, mask_targets: binary}, "
    "{loss: {truth: 1}, lr: 0.0001, lr_end: 0.00001, clip_norm: 0.1}]",
    "train.mask_prompts=2",
    "train.ema=0.9",
    "train.workers=2",
    "train.log_every=1",
    "train.checkpoint_every=4",
)


@pytest.fixture
def arguments(finished_run: Path, scene_tar: Path) -> tuple[str, ...]:
    """20 steps on the finished cache, in four phases; `run_dir` is still to be given."""
    images, _, cache = places(finished_run, scene_tar)
    return (*SETTINGS, images, cache)


@pytest.fixture
def recipe(finished_run: Path, scene_tar: Path, tmp_path: Path) -> Recipe:
    images, _, cache = places(finished_run, scene_tar)
    return load_recipe([*TINY, images, cache, f"run_dir={tmp_path / 'run'}", "train.workers=0"])


class Run:
    """A training in processes of its own."""

    def __init__(self, arguments: tuple[str, ...], run_dir: Path, launcher: tuple[str, ...] = ()) -> None:
        command = [sys.executable, *launcher, str(ROOT / "distill.py"), *arguments, f"run_dir={run_dir}"]
        self.run_dir = run_dir
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # another number of threads has other last bits
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def at_step(self, step: int) -> None:
        """Wait until so many steps are logged."""
        metrics, until = self.run_dir / "metrics.jsonl", time.monotonic() + 300
        while time.monotonic() < until:
            assert self.process.poll() is None, self.process.communicate()
            lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
            if any(json.loads(line)["step"] >= step for line in lines if line.endswith("\n")):
                return
            time.sleep(0.02)
        raise AssertionError(f"step {step} was not reached")

    def signal(self, number: int) -> None:
        """To all of its processes, as a scheduler or a terminal does."""
        os.killpg(self.process.pid, number)

    def finish(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, errors = self.process.communicate(timeout=300)
        return self.process.returncode, errors


@pytest.fixture
def running() -> Iterator[list[Run]]:
    """What still runs at the end is killed."""
    runs: list[Run] = []
    yield runs
    for run in runs:
        if run.process.poll() is None:
            run.signal(signal.SIGKILL)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_student(run_dir / "student.safetensors").state_dict()


def difference(first: Path, second: Path) -> float:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_killed_at_any_moment_and_stopped_it_ends_with_the_same_bits(
    arguments: tuple[str, ...], tmp_path: Path, running: list[Run]
) -> None:
    undisturbed = Run(arguments, tmp_path / "undisturbed")
    running.append(undisturbed)
    for step, number in ((3, signal.SIGKILL), (8, signal.SIGTERM), (12, signal.SIGKILL), (17, signal.SIGKILL)):
        run = Run(arguments, tmp_path / "killed")
        running.append(run)
        run.at_step(step)
        if step == 3:  # the trainer alone, as the system does that is out of memory: its workers live on for seconds
            run.process.kill()
            run.process.wait()
            continue
        run.signal(number)
        code, errors = run.finish()
        assert not (tmp_path / "killed" / "student.safetensors").exists()
        if number == signal.SIGTERM:
            assert code == 128 + signal.SIGTERM, errors
            assert (
                errors.strip().splitlines()[-1] == "distill.py: stopped by SIGTERM; the same command goes on from here"
            )
            assert "Traceback" not in errors
            (last, *_) = sorted((tmp_path / "killed" / "checkpoints").glob("step-*"), reverse=True)
            assert int(last.name.removeprefix("step-")) >= step
    last = Run(arguments, tmp_path / "killed")
    running.append(last)
    assert last.finish()[0] == 0
    assert undisturbed.finish()[0] == 0
    assert difference(tmp_path / "killed", tmp_path / "undisturbed") == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")
    assert len(losses(tmp_path / "killed")) == 20


@pytest.mark.slow
def test_two_processes_equal_one_and_go_on_after_a_kill(
    arguments: tuple[str, ...], tmp_path: Path, running: list[Run]
) -> None:
    exact = (*arguments, "train.batch_norm=frozen", "train.batch_size=8", "train.epochs=7")
    one, two, killed = tmp_path / "one", tmp_path / "two", tmp_path / "killed"
    for run_dir, launcher in ((one, ()), (two, TORCHRUN)):
        running.append(Run(exact, run_dir, launcher))
        code, errors = running[-1].finish()
        assert code == 0, errors
    assert len(losses(one)) == 20
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    running.append(Run(exact, killed, TORCHRUN))
    running[-1].at_step(9)
    running[-1].signal(signal.SIGKILL)
    running[-1].finish()
    running.append(Run(exact, killed, TORCHRUN))
    code, errors = running[-1].finish()
    assert code == 0, errors
    assert difference(killed, two) < 1e-6


@pytest.mark.slow
def test_sigterm_to_a_launch_of_two_processes_saves_and_exits(
    arguments: tuple[str, ...], tmp_path: Path, running: list[Run]
) -> None:
    running.append(Run(arguments, tmp_path / "run", TORCHRUN))
    running[-1].at_step(5)
    running[-1].process.send_signal(signal.SIGTERM)
    code, errors = running[-1].finish()
    assert code != 0
    assert errors.count("the same command goes on from here") == 1
    (last, *_) = sorted((tmp_path / "run" / "checkpoints").glob("step-*"), reverse=True)
    assert int(last.name.removeprefix("step-")) >= 5


@pytest.mark.slow
def test_two_machines_with_shards_of_their_own_train_together(
    finished_run: Path, scene_tar: Path, tmp_path: Path, running: list[Run], cli: Cli
) -> None:
    images, _, _ = places(finished_run, scene_tar)
    whole = f"cache.dir={tmp_path / 'whole'}"
    made = cli(*TINY, "stage=precompute", images, whole, f"run_dir={tmp_path / 'made'}", "cache.images_per_shard=3")
    assert made.returncode == 0, made.stderr
    shards = sorted((tmp_path / "whole").glob("shard-*.h5"))
    assert len(shards) == 8
    for node in (0, 1):
        directory = tmp_path / f"node{node}"
        directory.mkdir()
        for path in (tmp_path / "whole" / "cache.json", *shards[node::2]):
            os.link(path, directory / path.name)
    port = 20000 + os.getpid() % 20000
    settings = (*TINY, "stage=train", images, "train.batch_norm=frozen", "train.epochs=10", "train.log_every=1")

    def start(node: int, cache: Path, run_dir: str) -> Run:
        launcher = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={node}")
        rendezvous = ("--master_addr=127.0.0.1", f"--master_port={port}")
        arguments = (*settings, f"cache.dir={cache}", "cache.per_node=true")
        return Run(arguments, tmp_path / run_dir, (*launcher, *rendezvous))

    running += [start(node, tmp_path / f"node{node}", "run") for node in (0, 1)]
    for run in running:
        code, errors = run.finish()
        assert code == 0, errors
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "val_mse" in line]
    assert scores[-1]["val_mse"] < 0.7 * scores[0]["val_mse"]

    # the same images are held out as where one machine has everything: the untrained student scores alike
    alone = cli(*settings, whole, f"run_dir={tmp_path / 'alone'}", "train.epochs=1")
    assert alone.returncode == 0, alone.stderr
    first = json.loads((tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()[0])
    assert scores[0]["val_mse"] == pytest.approx(first["val_mse"], rel=1e-5)
    assert scores[0]["val_miou"] == pytest.approx(first["val_miou"], abs=1e-3)

    running += [start(node, tmp_path / "whole", "refused") for node in (0, 1)]
    code, errors = running[-2].finish()
    assert code != 0
    assert "distill.py: cache.per_node: machines share 24 images; each takes its own" in errors


def test_the_last_checkpoints_and_the_best_are_kept_and_can_be_used(recipe: Recipe) -> None:
    recipe.train = replace(recipe.train, epochs=3, checkpoint_every=2, keep_checkpoints=2)
    accelerator = create_accelerator(recipe)
    train(recipe, accelerator)
    directory = Path(recipe.run_dir) / "checkpoints"
    lines = [json.loads(line) for line in (Path(recipe.run_dir) / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["val_miou"] for line in lines if line.get("val_miou") and line["step"]}
    best = json.loads((directory / "best.json").read_text())
    assert best["miou"] == scores[best["step"]] == max(scores.values())
    names = {path.name for path in directory.glob("step-*")}
    assert {*sorted(names)[-2:], best["checkpoint"]} == names
    recipe.checkpoint = str(directory / best["checkpoint"] / "student.safetensors")
    recipe.train = replace(recipe.train, watch_images=4)
    assert evaluate_masks(recipe, accelerator)
    measured = json.loads((Path(recipe.run_dir) / "evaluation.json").read_text())["masks"]
    at_best = next(line for line in lines if line["step"] == best["step"] and "val_mse" in line)
    assert measured["embedding"]["mse"] == pytest.approx(at_best["val_mse"], rel=1e-4)


def test_a_damaged_checkpoint_and_another_students_are_a_line(recipe: Recipe) -> None:
    recipe.train = replace(recipe.train, checkpoint_every=4)
    train(recipe, create_accelerator(recipe))
    directory, student = Path(recipe.run_dir) / "checkpoints", Path(recipe.run_dir) / "student.safetensors"
    student.unlink()
    other = replace(recipe, student=replace(recipe.student, overrides={"widths": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}))
    with pytest.raises(InputError, match=r"step-\d+ cannot be gone on from: it is of another student"):
        train(other, create_accelerator(other))
    latest = sorted(directory.glob("step-*"))[-1]
    damaged = latest / "optimizer.bin"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(InputError, match=rf"{latest.name} cannot be gone on from") as stopped:
        train(recipe, create_accelerator(recipe))
    assert "\n" not in str(stopped.value)


def test_what_a_worker_meets_is_a_line(recipe: Recipe, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "cache", tmp_path / "cache")
    recipe.cache = replace(recipe.cache, dir=str(tmp_path / "cache"))
    recipe.train = replace(recipe.train, workers=1)
    flip_a_bit(next((tmp_path / "cache").glob("shard-*.h5")), 0)
    before = set(multiprocessing.active_children())
    with pytest.raises(InputError, match="is damaged in row 0: its checksum does not hold") as stopped:
        train(recipe, create_accelerator(recipe))
    assert "\n" not in str(stopped.value)
    assert set(multiprocessing.active_children()) <= before  # the workers are gone, though the traceback is kept
