"""Small real files that the tests share: a tar of generated scenes, and one finished run of the whole pipeline."""

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from embeddings_cache.images.scenes import write_scene_tar
from forking import FORKS, run_forked
from heartbeat import heartbeat
from support import IMAGES, ROOT, TINY, Cli, places

os.environ["ACCELERATE_USE_CPU"] = "true"  # as CI; also for the processes that tests start
torch.set_num_threads(1)  # the models here are so small that threads would only wait for each other


def keep_to_one_core(worker: str) -> None:
    """Of several workers (`pytest -n`) each keeps to a core, as do the processes that its tests start: threads that
    wait for each other spin, and on cores that are busy a step takes fifty times as long."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


if hasattr(os, "sched_setaffinity") and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
    keep_to_one_core(worker)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    # A worker's standard output is nobody's, its standard error is the terminal.
    with heartbeat(item.nodeid, terminal=2 if "PYTEST_XDIST_WORKER" in os.environ else 1):
        return (yield)


@pytest.fixture(scope="session")
def scene_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SA-1B-style tar of 24 generated scenes, 160 px on the longest side."""
    path = tmp_path_factory.mktemp("scenes") / "sa_000000.tar"
    write_scene_tar(path, range(IMAGES), longest_side=160)
    return path


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    return Accelerator()


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run `distill.py` as a user does, in a process of its own; `launcher` goes before it."""

    def run(*arguments: str, launcher: tuple[str, ...] = (), cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        if FORKS and not launcher:
            return run_forked(ROOT / "distill.py", arguments, cwd, timeout=900)
        command = [sys.executable, *launcher, str(ROOT / "distill.py"), *arguments]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, scene_tar: Path, cli: Cli) -> Path:
    """A directory with `run/` and `cache/` of one run of all stages."""
    directory = tmp_path_factory.mktemp("finished")
    result = cli(*TINY, *places(directory, scene_tar))
    assert result.returncode == 0, result.stderr
    return directory
