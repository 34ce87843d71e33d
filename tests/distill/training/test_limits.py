"""Little shared memory, few open files: real limits, set for a process of its own."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distill.training import limits
from distill.training.limits import limit_of_workers, refuse_little_shared_memory
from students import InputError
from support import ROOT, TINY, places


def train(directory: Path, finished_run: Path, scene_tar: Path, *arguments: str, **options: object) -> str:
    """The last line of a training that fails."""
    images, _, cache = places(finished_run, scene_tar)
    command = [sys.executable, "distill.py", *TINY, "stage=train", images, cache, f"run_dir={directory / 'run'}"]
    shell = options.pop("shell", ())
    result = subprocess.run(
        [*shell, *command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, **options
    )
    assert result.returncode == 2, result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_few_open_files_are_seen_before_a_batch_is_lost(finished_run: Path, scene_tar: Path, tmp_path: Path) -> None:
    """PyTorch's worker would drop the batch that it cannot hand over, and the training process wait for ever."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    said = train(tmp_path, finished_run, scene_tar, "train.workers=2", "train.batch_size=20", preexec_fn=limit)
    assert said.startswith("distill.py: train.workers=2 at 20 images a batch need ")
    assert said.endswith(
        "open files, and this process may have 64: ulimit -n 4096 gives more, "
        "train.workers=0 reads in the training process"
    )


@pytest.mark.slow
def test_little_shared_memory_is_seen_before_a_worker_dies_of_it(
    finished_run: Path, scene_tar: Path, tmp_path: Path
) -> None:
    unshare = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=200k tmpfs /dev/shm && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("only root on Linux may have shared memory of its own")
    said = train(tmp_path, finished_run, scene_tar, "train.workers=1", shell=unshare)
    assert "MiB of shared memory for batches that wait, and /dev/shm has 0.2 MiB: docker run --shm-size=8g" in said


def test_shared_memory_as_docker_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB are too little for a recipe's 8 images of 1024 px and 4 workers, and enough for one of each.

    Validation reads while training's batches wait: what it will need is said before training begins.
    """
    monkeypatch.setattr(limits, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 64 << 20))
    image = 2 * 256 * 64 * 64 + 3 * 1024**2
    refuse_little_shared_memory(image, workers=1, validation=99)
    refuse_little_shared_memory(2 * image, workers=2, validation=0)
    for images, workers, validation, needed in ((8, 4, 99, "800.0"), (8, 4, 1, "440.0"), (2, 2, 5, "110.0")):
        said = rf"train\.workers={workers} needs {needed} MiB of shared memory .* has 64\.0 MiB"
        with pytest.raises(InputError, match=said):
            refuse_little_shared_memory(images * image, workers, validation)


NOT_FORESEEN = """
import sys
from distill.main import main
from distill.training import batches

batches.refuse_little_shared_memory = batches.refuse_few_files = lambda *limits: None
sys.exit(main(sys.argv[1:]))
"""


def test_a_batch_that_cannot_be_handed_over_ends_training(finished_run: Path, scene_tar: Path, tmp_path: Path) -> None:
    """Whatever the estimates foresee: it is never dropped in a worker's thread and waited for."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (52, 52))

    images, _, cache = places(finished_run, scene_tar)
    arguments = [*TINY, "stage=train", images, cache, f"run_dir={tmp_path / 'run'}", "train.batch_size=20"]
    command = [sys.executable, "-c", NOT_FORESEEN, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, preexec_fn=limit)
    assert result.returncode == 2, result.stderr
    assert "train.workers=1 hand over more files than this system lets a process open" in result.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ..."),
            "--shm-size",
        ),
        (RuntimeError("unable to write to file </torch_71_2>: No space left on device (28)"), "--shm-size"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (
            RuntimeError("unable to open shared memory object </t> in read-write mode: Too many open files (24)"),
            "ulimit",
        ),
        (EOFError(), "ulimit -n"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), ""),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ""),
    ],
)
def test_what_a_worker_met_with(error: Exception, said: str) -> None:
    told = limit_of_workers(error, 3)
    assert said in told
    assert bool(said) == bool(told)
