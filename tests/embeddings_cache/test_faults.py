"""What may go wrong while a cache is made: it stops in order, keeps what it had, and goes on."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest

from caches import Make
from embeddings_cache.images.scenes import write_scene_tar
from embeddings_cache.shards import space
from embeddings_cache.shards.format import CacheIdentity
from embeddings_cache.shards.reader import EmbeddingsCache, shard_paths
from pictures import encoded, odd_files, write_tar, write_zip
from students import InputError
from support import ROOT, TINY, Cli, places

IMAGES = 120
LONGEST = 160

Start = Callable[..., subprocess.Popen[str]]


class Usage(NamedTuple):
    free: int


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of scenes, enough for a run to be interrupted."""
    directory = tmp_path_factory.mktemp("many")
    for first in range(0, IMAGES, 40):
        write_scene_tar(directory / f"{first:04d}.tar", range(first, first + 40), LONGEST)
    return directory


@pytest.fixture
def start(tars: Path) -> Iterator[Start]:
    """`start_precompute` on those tars; what still runs at the end is killed."""
    running: list[subprocess.Popen[str]] = []

    def run(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        running.append(start_precompute(tars, *arguments, **options))
        return running[-1]

    yield run
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def start_precompute(
    tars: Path, directory: Path, *launcher: str, workers: int = 0, prepare: Callable[[], object] = int
) -> subprocess.Popen[str]:
    """The precompute stage of the quickstart, in a process group of its own.

    A thread a process, whatever the launcher: their number decides the order of sums, and so the last bit.
    """

    def begin() -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: 2 if launcher else 1])
        prepare()

    command = [sys.executable, *launcher, str(ROOT / "distill.py"), "recipe=quickstart", "stage=precompute"]
    command += ["image_size=128", f"data.images={tars}", f"cache.dir={directory / 'cache'}", "data.val_images=4"]
    command += [f"run_dir={directory / 'run'}", "cache.images_per_shard=5", "teacher.batch_size=1"]
    command += [f"data.workers={workers}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, preexec_fn=begin, **pipes)


def wait_for_shards(directory: Path, count: int, process: subprocess.Popen[str]) -> None:
    while len(shard_paths(directory / "cache")) < count:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)


def contents(directory: Path) -> dict[str, bytes]:
    return {row.key: row.embedding.tobytes() + row.encoded for row in EmbeddingsCache(directory / "cache")}


def assert_goes_on(process: subprocess.Popen[str], directory: Path, undisturbed: dict[str, bytes]) -> None:
    """The same command, started again, ends with the cache that it would have made undisturbed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert contents(directory) == undisturbed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tars: Path) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("undisturbed")
    process = start_precompute(tars, directory)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return contents(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "name", "workers"),
    [(signal.SIGTERM, "SIGTERM", 0), (signal.SIGINT, "SIGINT", 2)],
)
def test_preemption_keeps_every_finished_row(
    number: int, name: str, workers: int, tmp_path: Path, start: Start, undisturbed: dict[str, bytes]
) -> None:
    """The signal goes to all processes of the run, as schedulers and terminals send it; all of them end."""
    process = start(tmp_path, workers=workers)
    wait_for_shards(tmp_path, 2, process)
    assert len(children(process.pid)) == workers
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=300)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert process.returncode == 128 + number
    assert output.splitlines()[-1] == f"distill.py: stopped by {name}; the same command goes on from here"
    kept = sum(len(h5py.File(shard)["keys"]) for shard in shard_paths(tmp_path / "cache"))
    assert 10 <= kept < IMAGES
    assert not list((tmp_path / "cache").glob(".tmp-*"))
    assert_goes_on(start(tmp_path), tmp_path, undisturbed)


@pytest.mark.slow
def test_preemption_of_several_processes(tmp_path: Path, start: Start, undisturbed: dict[str, bytes]) -> None:
    """Launcher and workers all get SIGTERM, and the workers another one from the launcher."""
    process = start(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    wait_for_shards(tmp_path, 2, process)
    for pid in (process.pid, *children(process.pid)):
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert output.count("distill.py: stopped by SIGTERM; the same command goes on from here") == 1, output
    assert not list((tmp_path / "cache").glob(".tmp-*"))
    assert_goes_on(start(tmp_path), tmp_path, undisturbed)


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_goes_on(
    tmp_path: Path, start: Start, undisturbed: dict[str, bytes]
) -> None:
    """kill -9 at 8 random moments, of one process or of two that share the work, with and without workers: of all at
    once (a machine dies), or of any one of them."""
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    chance = random.Random(0)
    takes = {}
    for launcher in ((), two):
        began = time.monotonic()
        whole = start(tmp_path / f"timed{len(takes)}", *launcher)
        output, _ = whole.communicate(timeout=300)
        assert whole.returncode == 0, output
        takes[launcher] = time.monotonic() - began

    kills, finished = 0, []
    directory = tmp_path / "0"
    while kills < 8:
        kept = {shard: shard.stat().st_mtime_ns for shard in shard_paths(directory / "cache")}
        launcher = chance.choice(((), (), two))
        process = start(directory, *launcher, workers=chance.choice((0, 1)))
        if chance.random() < 0.5:
            time.sleep(chance.uniform(0, takes[launcher]))
        else:  # while rows are being written
            wait_for_shards(directory, min(len(kept) + 1, IMAGES // 5), process)
            time.sleep(chance.uniform(0, 0.3))
        kills += kill_some(process, chance)
        # What was finished stays as it was: at most the shards being written are made again.
        assert kept.items() <= {shard: shard.stat().st_mtime_ns for shard in shard_paths(directory / "cache")}.items()
        if is_finished(directory):
            finished.append(directory)
            directory = tmp_path / str(len(finished))
    assert_goes_on(start(directory, *two), directory, undisturbed)
    for done in [*finished, directory]:
        assert contents(done) == undisturbed
        assert not list((done / "cache").glob(".tmp-*"))


def kill_some(process: subprocess.Popen[str], chance: random.Random) -> bool:
    """kill -9 for one process, or for the launcher and all of them; False where they had ended before."""
    ranks = children(process.pid)
    descendants = [*ranks, *(worker for rank in ranks for worker in children(rank))]
    alive = process.poll() is None
    if alive and descendants and chance.random() < 0.5:
        kill_quietly(chance.choice(descendants))
    else:
        for pid in (process.pid, *descendants):
            kill_quietly(pid)
    process.communicate(timeout=300)
    return alive


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def kill_quietly(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def is_finished(directory: Path) -> bool:
    info = directory / "cache" / "cache.json"
    return info.exists() and json.loads(info.read_text())["complete"]


@pytest.mark.slow
def test_a_file_that_may_not_grow_ends_in_one_line(tmp_path: Path, start: Start, undisturbed: dict[str, bytes]) -> None:
    """A limit on the size of a file stands for a full disk: HDF5 is refused in the middle of a shard."""
    make_shard = 5 * 128 * 8 * 8 * 2

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (make_shard, make_shard))

    process = start(tmp_path, prepare=limit)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    last = output.splitlines()[-1]
    assert last.startswith(f"distill.py: cannot write to {tmp_path / 'cache'}: File too large. ")
    assert last.endswith("All finished shards are kept; the same command goes on from them")
    assert "Traceback" not in output
    assert not list((tmp_path / "cache").glob(".tmp-*"))
    assert_goes_on(start(tmp_path), tmp_path, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """8 MiB of their own, twice what the cache takes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root on Linux may mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_that_others_fill_ends_in_one_line(
    small_disk: Path, start: Start, undisturbed: dict[str, bytes]
) -> None:
    process = start(small_disk)
    wait_for_shards(small_disk, 2, process)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(8 << 20))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    last = output.splitlines()[-1]
    assert last.startswith(f"distill.py: cannot write to {small_disk / 'cache'}: No space left on device. ")
    assert "Traceback" not in output
    assert not list((small_disk / "cache").glob(".tmp-*"))
    kept = {shard: shard.read_bytes() for shard in shard_paths(small_disk / "cache")}
    assert len(kept) >= 2
    filler.unlink()
    assert_goes_on(start(small_disk), small_disk, undisturbed)
    assert kept.items() <= {shard: shard.read_bytes() for shard in shard_paths(small_disk / "cache")}.items()


def test_a_disk_that_is_too_small_is_seen_before_the_start(
    tmp_path: Path, make: Make, identity: CacheIdentity, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Usage(free=200_000))
    with pytest.raises(InputError, match=rf"0\.0 GiB needed for 24 images, 0\.0 GiB free at {tmp_path}.*int8"):
        make(tmp_path)
    assert not shard_paths(tmp_path)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Usage(free=2**30))
    make(tmp_path)
    assert "GiB needed for 24 images, 1.0 GiB free at" in capsys.readouterr().out


def test_the_estimate_is_near_what_a_cache_takes(tmp_path: Path, cache_dir: Path, identity: CacheIdentity) -> None:
    taken = sum(path.stat().st_size for path in shard_paths(cache_dir)) / 24
    assert 0.8 * taken < space.row_bytes(identity) < 2 * taken
    large = replace(identity, image_size=1024, embedding_shape=(256, 64, 64))
    assert 112_000 * space.row_bytes(large) / 2**30 == pytest.approx(260, rel=0.1)
    half = space.row_bytes(replace(large, dtype="int8")) / space.row_bytes(large)
    assert half == pytest.approx(0.57, abs=0.03)


def test_everything_that_may_be_fed_to_it(tmp_path: Path, make: Make) -> None:
    """One tar of all that people have; every file is a row, part of one, or has its reason."""
    odd = odd_files()
    tar = Path(
        write_tar(tmp_path / "odd.tar", [*((name, content) for name, content, _ in odd), ("last.jpg", encoded())])
    )
    content = tar.read_bytes()
    tar.write_bytes(content[: content.index(b"last.jpg") + 700])  # cut short in the last image
    with pytest.raises(InputError, match=r"7 of \d+ samples are bad, more than data\.max_skipped=0\.01; the commonest"):
        make(tmp_path / "strict", tar=tar, max_skipped=0.01)
    info = make(tmp_path / "cache", tar=tar, max_skipped=0.5)
    outcomes = Counter(outcome for _, _, outcome in odd)
    reasons = reasons_in(tmp_path / "cache" / "skipped.jsonl")
    for name, _, outcome in odd:
        if outcome not in ("row", "used", "noted", "left out"):
            assert outcome in reasons.get(name, reasons.get(Path(name).stem, "")), name
    assert "cut short" in reasons[str(tar)]
    rows = {row.key: row for row in EmbeddingsCache(tmp_path / "cache")}
    assert len(rows) == info.images == outcomes["row"]
    assert sum(row.annotation is not None for row in rows.values()) == outcomes["used"]
    assert (
        len(reasons_in(tmp_path / "cache" / "notes.jsonl")) == info.noted == outcomes["noted"] + 1
    )  # and a dark picture
    assert sum(info.left_out.values()) == outcomes["left out"]
    told = outcomes["row"] + outcomes["used"] + outcomes["noted"] + sum(info.left_out.values()) + info.skipped - 1
    assert told == len(odd)
    assert rows["turned"].original_size == rows["unwritable"].original_size == (40, 30)
    assert rows["dot"].input_size == (128, 128)
    assert rows["wide"].input_size == (1, 128)
    assert all(np.isfinite(row.embedding).all() for row in rows.values())


def reasons_in(path: Path) -> dict[str, str]:
    return {line["key"]: line["reason"] for line in map(json.loads, path.read_text().splitlines())}


@pytest.mark.slow
def test_the_whole_pipeline_runs_over_everything_odd(tmp_path: Path, cli: Cli) -> None:
    """One command, from a tar, a zip and a folder of the same, each with keys of its own."""
    odd = [(name, content, outcome) for name, content, outcome in odd_files() if outcome != "seen before"]
    write_tar(tmp_path / "a.tar", [(f"tar/{name.removeprefix('./')}", content) for name, content, _ in odd])
    write_zip(tmp_path / "b.zip", {f"zip/{name}": content for name, content, _ in odd})
    for name, content, _ in odd:
        path = tmp_path / "photos" / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    images = f"[{tmp_path}/a.tar, {tmp_path}/b.zip, {tmp_path}/photos]"
    result = cli(*TINY, *places(tmp_path, images), "data.max_skipped=0.5", "train.loss={mse: 1.0, mask: 0.1}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "report" / "index.html").exists()
    info = json.loads((tmp_path / "cache" / "cache.json").read_text())
    by_name = Counter(outcome for _, _, outcome in odd)
    # A folder has no keys that stop at a dot: there `map.seg.png` and the two ambiguous ones are pictures like others,
    # and an annotation without picture is a file like others.
    assert info["images"] == 3 * by_name["row"] + 3
    assert sum(info["left_out"].values()) == 3 * by_name["left out"]
    assert info["skipped"] == 2 * 5 + 2
    files = 3 * len(odd)
    annotations = 3 * (by_name["used"] + by_name["noted"])
    assert info["images"] + annotations + sum(info["left_out"].values()) + info["skipped"] == files
