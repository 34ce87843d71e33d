import io
import json
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import h5py
import numpy as np
import pytest
from torch.utils.data import DataLoader

from caches import Make, flip_a_bit
from embeddings_cache.shards.format import CacheIdentity, identity_of
from embeddings_cache.shards.reader import EmbeddingsCache, shard_paths
from students import InputError


def test_a_shard_can_be_read_with_h5py_alone(cache_dir: Path, identity: CacheIdentity) -> None:
    with h5py.File(cache_dir / "shard-00000-00000.h5") as file:
        assert file["embeddings"].shape == (10, 128, 8, 8)
        assert file["embeddings"].dtype == np.float16
        assert file["embeddings"].chunks == (1, 128, 8, 8)
        assert file["embeddings"].fletcher32
        assert file["images"].shape == file["keys"].shape == file["annotations"].shape == (10,)
        assert file["original_size"].dtype == file["input_size"].dtype == np.int32
        assert file["original_size"].shape == (10, 2)
        assert file.attrs["version"] == 1
        assert file.attrs["images"] == 10
        assert file.attrs["teacher_name"] == "toy"
        assert file.attrs["teacher_sha256"] == identity.teacher_sha256
        assert file.attrs["preprocess"] == identity.preprocess
        assert "software_torch" in file.attrs
    described = json.loads((cache_dir / "cache.json").read_text())
    assert (described["version"], described["complete"], described["images"], described["shards"]) == (1, True, 24, 3)


def test_a_flipped_bit_is_noticed(tmp_path: Path, make: Make) -> None:
    make(tmp_path)
    shard = shard_paths(tmp_path)[0]
    with h5py.File(shard) as file:
        key = file["keys"][0].decode()
    flip_a_bit(shard, 0)
    cache = EmbeddingsCache(tmp_path)
    for read in (cache.__getitem__, cache.embedding):
        with pytest.raises(InputError, match=r"shard-00000-00000\.h5 is damaged in row 0: its checksum does not hold"):
            read(cache.keys.index(key))


def test_more_shards_than_files_may_be_open(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embeddings_cache.shards.reader.files_open_at_most", lambda: 1)
    cache = EmbeddingsCache(cache_dir)
    for index in (0, 23, 5, 12, 0, 23):
        assert cache[index].key == cache.keys[index]


def test_split_holds_out_by_hash(cache_dir: Path) -> None:
    cache = EmbeddingsCache(cache_dir)
    train, held_out = cache.split(5)
    assert len(held_out) == 5
    assert sorted(train + held_out) == list(range(24))
    assert set(cache.split(4)[1]) < set(held_out)
    with pytest.raises(InputError, match="leaves none"):
        cache.split(24)


def test_an_embedding_alone_is_the_rows(cache_dir: Path) -> None:
    cache = EmbeddingsCache(cache_dir)
    for index in (23, 0, 11):
        assert np.array_equal(cache.embedding(index), cache[index].embedding)


class CountingFile(io.FileIO):
    """Notes the size of every read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: list[int] = []

    def readinto(self, buffer: memoryview) -> int:
        self.reads.append(len(buffer))
        return super().readinto(buffer)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_an_embedding_costs_one_read(
    dtype: str, tmp_path: Path, identity: CacheIdentity, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, identity=replace(identity, dtype=dtype), images_per_shard=24)
    disk = CountingFile(shard_paths(tmp_path)[0])
    original = h5py.File
    cache = EmbeddingsCache(tmp_path)
    monkeypatch.setattr("embeddings_cache.shards.trouble.h5py.File", lambda path, mode, **_: original(disk, mode))
    assert cache.embedding(0).any()  # the index of chunks is read once
    disk.reads.clear()
    for row in (17, 3, 8):
        assert cache.embedding(row).any()
    assert disk.reads == [128 * 8 * 8 * (2 if dtype == "float16" else 1) + 4] * 3  # and its checksum


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same_rows(method: str, cache_dir: Path) -> None:
    cache = EmbeddingsCache(cache_dir)
    expected = [row.embedding.tobytes() for row in cache]  # the files are open before the workers start
    loader = DataLoader(cache, num_workers=2, collate_fn=itemgetter(0), multiprocessing_context=method)
    assert [row.embedding.tobytes() for row in loader] == expected


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    (tmp_path / "cache.json").write_text('{"what": "something else"}')
    return tmp_path


def test_foreign_directories_are_refused(foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(InputError, match="does not describe an embeddings cache"):
        EmbeddingsCache(foreign)
    with pytest.raises(InputError, match="does not exist: run stage=precompute"):
        EmbeddingsCache(tmp_path_factory.mktemp("empty"))


def test_results_of_earlier_versions_stay_current(identity: CacheIdentity) -> None:
    """They note the cache that they were made from as it was described then, and are compared with what is said now."""
    assert set(identity.as_json()) == {
        "teacher_name", "teacher_sha256", "teacher_dtype", "image_size", "embedding_shape", "dtype", "jpeg_quality",
        "preprocess", "data_images", "data_fraction",
    }  # fmt: skip
    assert replace(identity, data_annotations="instances.json").as_json()["data_annotations"] == "instances.json"
    assert identity_of(identity.as_json()) == identity
