import errno
import fcntl
import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

from caches import Make, flip_a_bit
from embeddings_cache.embed import embed_again
from embeddings_cache.shards import trouble, verify
from embeddings_cache.shards.format import CacheIdentity
from embeddings_cache.shards.reader import EmbeddingsCache, keys_in, shard_paths
from embeddings_cache.shards.verify import DamagedCache, Embed, verify_cache
from embeddings_cache.teacher.encoder import TeacherEncoder
from students import CheckFailed, InputError


@pytest.fixture
def copy(cache_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache_dir, tmp_path / "copy"))


@pytest.fixture(scope="module")
def embed(sam: Sam) -> Embed:
    return partial(embed_again, TeacherEncoder(sam, torch.device("cpu")))


def test_a_good_cache_passes(cache_dir: Path, embed: Embed, capsys: pytest.CaptureFixture[str]) -> None:
    verify_cache(cache_dir, embed, recompute=24)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == [path.name for path in shard_paths(cache_dir)]
    assert all("made again: off by" in line and line.endswith("ok") for line in lines[:3])
    assert lines[3] == "verify: 24 images in 3 shards, all as they should be"


def test_one_flipped_bit_is_found_dropped_and_made_again(
    copy: Path, cache_dir: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_a_bit(shard_paths(copy)[1], 4)
    with pytest.raises(InputError, match=r"shard-00000-00001\.h5 is damaged in row 4: .*checksum.*stage=verify"):
        list(EmbeddingsCache(copy))
    with pytest.raises(DamagedCache, match=r"1 of 3 shards are damaged.*verify\.drop=true puts them aside"):
        verify_cache(copy, None, 0)
    assert "shard-00000-00001.h5  10 rows  DAMAGED: row 4 (" in capsys.readouterr().out
    harmed = shard_paths(copy)[1].read_bytes()
    with pytest.raises(DamagedCache, match="lie in damaged/ now; stage=precompute makes the missing rows again"):
        verify_cache(copy, None, 0, drop=True)
    assert (copy / "damaged" / "shard-00000-00001.h5").read_bytes() == harmed
    kept = {path.name: path.stat().st_mtime_ns for path in shard_paths(copy)}
    assert list(kept) == ["shard-00000-00000.h5", "shard-00000-00002.h5"]
    make(copy)
    verify_cache(copy, None, 0)
    assert {name: (copy / name).stat().st_mtime_ns for name in kept} == kept
    assert EmbeddingsCache(copy).keys == EmbeddingsCache(cache_dir).keys


def test_what_is_put_aside_replaces_nothing(copy: Path, make: Make) -> None:
    for _ in range(2):
        flip_a_bit(shard_paths(copy)[-1], 1)
        with pytest.raises(DamagedCache):
            verify_cache(copy, None, 0, drop=True)
        make(copy)
    assert len(list((copy / "damaged").iterdir())) == 2


def test_a_shard_that_another_process_has_locked_is_read(copy: Path) -> None:
    with shard_paths(copy)[1].open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        verify_cache(copy, None, 0, drop=True)
        assert len(list(EmbeddingsCache(copy))) == 24


@pytest.fixture
def no_file_left() -> Iterator[None]:
    """This process may not open another file."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as held:
        highest = held.enter_context(Path(os.devnull).open()).fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, limit[1]))
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limit)
        with suppress(OSError):
            while True:
                held.enter_context(Path(os.devnull).open())
        yield


def test_too_many_open_files_are_no_damage(cache_dir: Path, identity: CacheIdentity, no_file_left: None) -> None:
    with pytest.raises(
        InputError, match=r"shard-00000-00000\.h5 cannot be read now: Too many open files \(raise the limit"
    ):
        keys_in(cache_dir / "shard-00000-00000.h5", identity)


@pytest.mark.parametrize(
    "number", ["EAGAIN", "EMFILE", "ENFILE", "EACCES", "EPERM", "ENOLCK", "EIO", "ESTALE", "ENOMEM"]
)
@pytest.mark.parametrize("told", ["by number", "in HDF5's text"])
def test_what_passes_is_not_damage_and_nothing_is_removed(
    number: str, told: str, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, harmed = getattr(errno, number), shard_paths(copy)[1]
    error = OSError(code, "Unable to synchronously open file")
    if told != "by number":
        error = OSError(f"Can't read data (file read failed: errno = {code}, error message = 'x', buf = 0x7)")

    def open_file(path: Path, *arguments: Any, **options: Any) -> h5py.File:
        if path == harmed:
            raise error
        return opened(path, *arguments, **options)

    opened = h5py.File
    monkeypatch.setattr(trouble.h5py, "File", open_file)
    flip_a_bit(shard_paths(copy)[2], 1)
    with pytest.raises(DamagedCache, match=r"1 of 3 shards are damaged; 1 of 3 shards cannot be read now"):
        verify_cache(copy, None, 0, drop=True)
    assert os.strerror(code) in capsys.readouterr().out
    assert [path.name for path in (copy / "damaged").iterdir()] == ["shard-00000-00002.h5"]
    assert harmed.exists()
    with pytest.raises(InputError, match=r"shard-00000-00001\.h5 cannot be read now"):
        EmbeddingsCache(copy, partly=True)


def test_a_cache_that_cannot_be_read_now_is_not_called_damaged(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_file(path: Path) -> h5py.File:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(verify, "open_shard", open_file)
    with pytest.raises(CheckFailed, match=r"3 of 3 shards cannot be read now: Stale file handle .* no damage") as told:
        verify_cache(copy, None, 0, drop=True)
    assert not isinstance(told.value, DamagedCache)
    assert len(shard_paths(copy)) == 3


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), OSError("cannot allocate")])
def test_what_the_teacher_runs_into_is_not_damage(error: Exception, copy: Path) -> None:
    def embed(row: object) -> torch.Tensor:
        raise error

    with pytest.raises(type(error), match=str(error)):
        verify_cache(copy, embed, recompute=5, drop=True)
    assert len(shard_paths(copy)) == 3


def test_a_directory_that_cannot_be_listed_has_not_lost_its_shards(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refuse)
    for read in (EmbeddingsCache, partial(verify_cache, embed=None, recompute=0)):
        with pytest.raises(PermissionError):
            read(copy)


def damage_header(shard: Path) -> None:
    shard.write_bytes(b"\0" * 100 + shard.read_bytes()[100:])


def cut_short(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def lose_a_row(shard: Path) -> None:
    with h5py.File(shard, "r+") as file:
        file["images"].resize(9, axis=0)


def other_teacher(shard: Path) -> None:
    with h5py.File(shard, "r+") as file:
        file.attrs["teacher_sha256"] = "0" * 64


def not_finite(shard: Path) -> None:
    with h5py.File(shard, "r+") as file:
        file["embeddings"][3, 0, 0, 0] = np.nan


def broken_picture(shard: Path) -> None:
    with h5py.File(shard, "r+") as file:
        file["images"][3] = file["images"][3][:200]


def another_key(shard: Path) -> None:
    with h5py.File(shard, "r+") as file:
        file["keys"][3] = "sa_9999"


def a_key_twice(shard: Path) -> None:
    with h5py.File(shard, "r+") as file:
        file["keys"][3] = file["keys"][4]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_header, "signature"),
        (cut_short, "truncated"),
        (lose_a_row, "images has 9 rows, not 10"),
        (other_teacher, "SHA-256 of the teacher's weights"),
        (not_finite, r"row 3 \(.*not finite"),
        (broken_picture, r"row 3 \(.*checksum of key, picture and annotation"),
        (another_key, r"row 3 \(sa_9999\): the checksum of key"),
        (a_key_twice, r"is there 2 times"),
    ],
)
def test_damage_is_named(
    damage: Callable[[Path], None], named: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(shard_paths(copy)[1])
    with pytest.raises(DamagedCache, match="1 of 3 shards are damaged"):
        verify_cache(copy, None, 0)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "DAMAGED" in line]
    assert line.startswith("shard-00000-00001.h5")
    assert re.search(named, line), line


def test_an_embedding_that_is_not_the_teachers_is_found(
    copy: Path, embed: Embed, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checksum holds; only the teacher can tell."""
    with h5py.File(shard_paths(copy)[0], "r+") as file:
        file["embeddings"][2] = file["embeddings"][5]
    verify_cache(copy, None, 0)
    with pytest.raises(DamagedCache):
        verify_cache(copy, embed, recompute=24)
    assert "row 2 (sa_2): the teacher makes another embedding, off by" in capsys.readouterr().out


def lose(name: str, shard: Path) -> None:
    with h5py.File(shard, "r+") as file:
        del file[name]


def test_int8_without_its_scales_is_damage_and_an_older_shard_is_not(
    tmp_path: Path, identity: CacheIdentity, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, identity=replace(identity, dtype="int8"))
    lose("crc32", shard_paths(tmp_path)[0])
    verify_cache(tmp_path, None, 0)
    lose("scales", shard_paths(tmp_path)[1])
    with pytest.raises(DamagedCache, match="1 of 3 shards are damaged"):
        verify_cache(tmp_path, None, 0)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "DAMAGED" in line]
    assert line.startswith("shard-00000-00001.h5")


def test_an_unfinished_cache_is_checked_by_sample_too(
    copy: Path, embed: Embed, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((copy / "cache.json").read_text())
    (copy / "cache.json").write_text(json.dumps({**content, "complete": False, "images": 0, "shards": 0}))
    with pytest.raises(DamagedCache, match="is not finished"):
        verify_cache(copy, embed, recompute=5)
    again = re.findall(r"(\d+) made again", capsys.readouterr().out)
    assert sum(map(int, again)) == 5


def test_missing_rows_and_caches(copy: Path) -> None:
    shard_paths(copy)[2].unlink()
    with pytest.raises(DamagedCache, match="3 shards were made, 2 are there; 24 images were cached, 20 are there"):
        verify_cache(copy, None, 0)
    with pytest.raises(InputError, match="does not exist"):
        verify_cache(copy / "nowhere", None, 0)
