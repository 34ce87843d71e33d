from pathlib import Path

import h5py
import numpy as np
import pytest

from embeddings_cache.images import fingerprint
from embeddings_cache.shards.codec import CacheRow, crc32_of
from embeddings_cache.shards.format import CacheIdentity
from embeddings_cache.shards.reader import shard_paths
from embeddings_cache.shards.writer import BLOCK, ShardWriter
from embeddings_cache.system import Stopped

SHAPE = (3, 4, 4)


def rows_of(count: int, same: bool) -> list[CacheRow]:
    """With pictures of one length, or each of another."""
    rng = np.random.default_rng(0)
    return [
        CacheRow(
            f"sa_{n}é",
            rng.standard_normal(SHAPE).astype(np.float16),
            rng.bytes(50 if same else 50 + n),
            (n + 1, 2 * n + 1),
            (16 + n, 64),
            None if n % 3 else "{}" * n,
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("count", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 40, 41])
def test_every_row_is_in_its_shard(count: int, dtype: str, same: bool, tmp_path: Path) -> None:
    identity = CacheIdentity("toy", "0" * 64, "float32", 64, SHAPE, dtype, 95, fingerprint(), "x", 1.0)
    rows = rows_of(count, same)
    with ShardWriter(tmp_path, identity, 0, images_per_shard=40) as writer:
        for row in rows:
            writer.write(row)
    assert len(shard_paths(tmp_path)) == -(-count // 40)
    for number, path in enumerate(shard_paths(tmp_path)):
        expected = rows[40 * number : 40 * (number + 1)]
        with h5py.File(path) as shard:
            assert {len(dataset) for dataset in shard.values()} == {len(expected)} == {shard.attrs["images"]}
            for place, row in enumerate(expected):
                assert shard["keys"].asstr()[place] == row.key
                assert shard["images"][place].tobytes() == row.encoded
                assert shard["annotations"].asstr()[place] == (row.annotation or "")
                assert tuple(shard["original_size"][place]) == row.original_size
                assert tuple(shard["input_size"][place]) == row.input_size
                assert shard["crc32"][place] == crc32_of(row)
                found = shard["embeddings"][place]
                if dtype == "int8":
                    scales = shard["scales"][place][:, None, None]
                    np.testing.assert_allclose(found * scales, row.embedding, atol=scales.max() / 2 + 1e-6)
                else:
                    assert np.array_equal(found, row.embedding)


@pytest.mark.parametrize(("error", "kept"), [(Stopped(15), 19), (RuntimeError("a bug"), 0)])
def test_what_is_kept_when_it_ends_early(error: Exception, kept: int, tmp_path: Path) -> None:
    identity = CacheIdentity("toy", "0" * 64, "float32", 64, SHAPE, "float16", 95, fingerprint(), "x", 1.0)

    def write() -> None:
        with ShardWriter(tmp_path, identity, 0, images_per_shard=40) as writer:
            for row in rows_of(19, same=False):
                writer.write(row)
            raise error

    with pytest.raises(type(error)):
        write()
    assert sum(len(h5py.File(path)["keys"]) for path in shard_paths(tmp_path)) == kept
    assert not list(tmp_path.glob(".tmp-*"))
