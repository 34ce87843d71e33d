"""The cache on disk: its format, rows in and out, whether it is what it claims to be, and whether it will fit."""

from embeddings_cache.shards.codec import CacheRow, decode_pixels, encode_pixels
from embeddings_cache.shards.format import (
    DTYPES,
    CacheIdentity,
    CacheInfo,
    identity_of,
    images_name,
    read_info,
    refuse_other_cache,
    software_versions,
)
from embeddings_cache.shards.reader import (
    EmbeddingsCache,
    files_open_at_most,
    held_out_keys,
    is_complete,
    keys_in,
    shard_paths,
)
from embeddings_cache.shards.space import check_space, row_bytes
from embeddings_cache.shards.trouble import open_shard
from embeddings_cache.shards.verify import DamagedCache, verify_cache
from embeddings_cache.shards.writer import ShardWriter

__all__ = [
    "DTYPES",
    "CacheIdentity",
    "CacheInfo",
    "CacheRow",
    "DamagedCache",
    "EmbeddingsCache",
    "ShardWriter",
    "check_space",
    "decode_pixels",
    "encode_pixels",
    "files_open_at_most",
    "held_out_keys",
    "identity_of",
    "images_name",
    "is_complete",
    "keys_in",
    "open_shard",
    "read_info",
    "refuse_other_cache",
    "row_bytes",
    "shard_paths",
    "software_versions",
    "verify_cache",
]
