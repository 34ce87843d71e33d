import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

from caches import Make, flip_a_bit
from embeddings_cache.embed import embed_again
from embeddings_cache.shards.format import CacheIdentity
from embeddings_cache.shards.reader import EmbeddingsCache, shard_paths
from embeddings_cache.shards.verify import DamagedCache, Embed, verify_cache
from embeddings_cache.teacher.encoder import TeacherEncoder
from students import InputError


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
    with pytest.raises(DamagedCache, match=r"1 of 3 shards are damaged.*verify\.drop=true removes"):
        verify_cache(copy, None, 0)
    assert "shard-00000-00001.h5  10 rows  DAMAGED: row 4 (" in capsys.readouterr().out
    with pytest.raises(DamagedCache, match="stage=precompute makes the missing rows again"):
        verify_cache(copy, None, 0, drop=True)
    kept = {path.name: path.stat().st_mtime_ns for path in shard_paths(copy)}
    assert list(kept) == ["shard-00000-00000.h5", "shard-00000-00002.h5"]
    make(copy)
    verify_cache(copy, None, 0)
    assert {name: (copy / name).stat().st_mtime_ns for name in kept} == kept
    assert EmbeddingsCache(copy).keys == EmbeddingsCache(cache_dir).keys


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
