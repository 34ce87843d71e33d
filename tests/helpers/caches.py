"""What the tests of the cache share by name."""

from collections.abc import Callable
from pathlib import Path

import h5py

from embeddings_cache.shards.format import CacheInfo

SIZE = 128

Make = Callable[..., CacheInfo]


def flip_a_bit(shard: Path, row: int) -> None:
    """What a bad disk does to a row's embedding."""
    with h5py.File(shard, "r") as file:
        place = file["embeddings"].id.get_chunk_info(row).byte_offset + 100
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)
