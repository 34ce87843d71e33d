"""Reading a cache: rows by number, in any order, from any process."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from embeddings_cache.codec import CacheRow
from embeddings_cache.format import CacheInfo, read_info
from embeddings_cache.images import stable_hash
from students import InputError


class EmbeddingsCache(Sequence[CacheRow]):
    """All rows of a finished cache, ordered by key.

    The order, and so every number that names a row, depends on the keys alone: not on how many processes wrote the
    cache or in how many sittings. Files are opened on first use in each process, so that an instance may be pickled
    (spawn) or inherited (fork) by DataLoader workers.

    Raises:
        InputError: there is no finished cache at `directory`.
    """

    def __init__(self, directory: Path) -> None:
        info = read_info(directory)
        if info is None or not info.complete:
            state = "is not finished" if info else "does not exist"
            raise InputError(f"the cache at {directory} {state}: run stage=precompute")
        self.info: CacheInfo = info
        self.shards = shard_paths(directory)
        places = {key: place for place, key in _places(self.shards)}
        self.keys = sorted(places)
        self._places = [places[key] for key in self.keys]
        self._files: dict[int, h5py.File] = {}
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        """The row with this number.

        Raises:
            OSError: the embedding's checksum does not hold.
        """
        shard, row = self._places[index]
        file = self._file(shard)
        return CacheRow(
            key=self.keys[index],
            embedding=file["embeddings"][row],
            encoded=file["images"][row].tobytes(),
            original_size=_size(file["original_size"][row]),
            input_size=_size(file["input_size"][row]),
            annotation=file["annotations"][row].decode() or None,
        )

    def split(self, val_images: int) -> tuple[list[int], list[int]]:
        """Row numbers for training and for validation.

        The held-out images are those whose key hashes lowest; the same on every machine.

        Raises:
            InputError: nothing would be left to train on.
        """
        if val_images >= len(self):
            raise InputError(f"data.val_images={val_images} leaves none of the cache's {len(self)} images to train on")
        ranked = sorted(range(len(self)), key=lambda index: stable_hash(self.keys[index], "validation"))
        return sorted(ranked[val_images:]), sorted(ranked[:val_images])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def _file(self, shard: int) -> h5py.File:
        if self._pid != os.getpid():  # inherited by fork: the parent's handles are not ours
            self._files, self._pid = {}, os.getpid()
        if shard not in self._files:
            self._files[shard] = h5py.File(self.shards[shard], "r")
        return self._files[shard]


def shard_paths(directory: Path) -> list[Path]:
    """The finished shards of a cache, in order."""
    return sorted(directory.glob("shard-*.h5"))


def keys_in(shard: Path) -> list[str]:
    """The keys of a shard, in row order.

    Raises:
        InputError: the file is damaged.
    """
    try:
        with h5py.File(shard, "r") as file:
            return [key.decode() for key in file["keys"][:]]
    except (OSError, KeyError) as error:
        raise InputError(f"{shard} is damaged; remove it and run stage=precompute again: {error}") from error


def _size(stored: np.ndarray) -> tuple[int, int]:
    return int(stored[0]), int(stored[1])


def _places(shards: list[Path]) -> list[tuple[tuple[int, int], str]]:
    """(shard number, row) and key of every row, last shard first, so that in a dict the first one wins."""
    return [((s, r), key) for s in reversed(range(len(shards))) for r, key in enumerate(keys_in(shards[s]))]
