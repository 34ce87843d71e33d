"""Reading a cache: rows by number, in any order, from any process."""

import os
import resource
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from embeddings_cache.shards.codec import CacheRow, decode_embedding
from embeddings_cache.shards.format import CacheIdentity, CacheInfo, identity_of, read_info
from embeddings_cache.shards.trouble import damage_of, open_shard, passing_trouble
from embeddings_cache.system import stable_hash
from students import InputError

FILES_OPEN = 4096
"""Shards that a process holds open at most where the system sets no limit."""


class EmbeddingsCache(Sequence[CacheRow]):
    """All rows of a finished cache, ordered by key.

    The order, and so every number that names a row, depends on the keys alone: not on how many processes wrote the
    cache or in how many sittings. Files are opened on first use in each process, so that an instance may be pickled
    (spawn) or inherited (fork) by DataLoader workers.

    Args:
        directory: of the cache.
        partly: take it as whole with some of its shards, those that a machine has on a disk of its own.

    Raises:
        InputError: there is no finished cache at `directory`.
    """

    def __init__(self, directory: Path, partly: bool = False) -> None:
        info = read_info(directory)
        whole = info is not None and ((info.complete and partly) or is_complete(directory, info))
        if info is None or not whole:
            state = "is not finished, or has lost a shard" if info else "does not exist"
            raise InputError(f"the cache at {directory} {state}: run stage=precompute")
        self.info: CacheInfo = info
        self.shards = shard_paths(directory)
        keys = [keys_in(shard, info.identity) for shard in self.shards]
        # Where two shards have a key (two sources did, read by two processes), the first one's row counts.
        places = {key: (shard, row) for shard in reversed(range(len(keys))) for row, key in enumerate(keys[shard])}
        self.keys = sorted(places)
        if not self.keys:
            raise InputError(f"the cache at {directory} is empty")
        self._places = [places[key] for key in self.keys]
        self._files: OrderedDict[int, OpenShard] = OrderedDict()
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        """The row with this number.

        Raises:
            InputError: it is damaged: its checksum does not hold, or HDF5 cannot find it.
        """
        shard, row = self._places[index]
        with self._naming_damage(shard, row):
            return self._open(shard).row(row, self.keys[index])

    def embedding(self, index: int) -> np.ndarray:
        """The embedding of the row with this number, float16 (C, h, w), without reading the rest of it.

        Raises:
            InputError: as for the row.
        """
        shard, row = self._places[index]
        with self._naming_damage(shard, row):
            return self._open(shard).embedding(row)

    def split(self, val_images: int) -> tuple[list[int], list[int]]:
        """Row numbers for training and for validation (`held_out_keys`), in order.

        Raises:
            InputError: nothing would be left to train on.
        """
        held_out = held_out_keys(self.keys, val_images)
        rows = range(len(self))
        return [r for r in rows if self.keys[r] not in held_out], [r for r in rows if self.keys[r] in held_out]

    @contextmanager
    def _naming_damage(self, shard: int, row: int) -> Iterator[None]:
        try:
            yield
        except (OSError, LookupError, ValueError, RuntimeError) as error:
            refuse_for_now(self.shards[shard], error)
            raise InputError(
                f"{self.shards[shard]} is damaged in row {row}: {damage_of(error)}. stage=verify finds all damage"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def _open(self, shard: int) -> "OpenShard":
        if self._pid != os.getpid():  # inherited by fork: the parent's handles are not ours
            self._files, self._pid = OrderedDict(), os.getpid()
        if shard not in self._files:
            self._files[shard] = OpenShard(self.shards[shard])
            if len(self._files) > files_open_at_most():
                self._files.popitem(last=False)[1].file.close()
        self._files.move_to_end(shard)
        return self._files[shard]


class OpenShard:
    """A shard opened for reading; small datasets are read at once, and each row then costs one read a large one.

    Everything may raise what h5py raises for a damaged file.
    """

    def __init__(self, path: Path) -> None:
        self.file = open_shard(path)
        self.embeddings, self.images, self.annotations = (
            _Rows(self.file[name]) for name in ("embeddings", "images", "annotations")
        )
        self.scales = self.file["scales"][:] if self.file["embeddings"].dtype == np.int8 else None
        self.original_size, self.input_size = self.file["original_size"][:], self.file["input_size"][:]

    def embedding(self, row: int) -> np.ndarray:
        """float16 (C, h, w)."""
        return decode_embedding(self.embeddings[row], None if self.scales is None else self.scales[row])

    def row(self, row: int, key: str) -> CacheRow:
        """All of a row; its key is known to the caller."""
        return CacheRow(
            key=key,
            embedding=self.embedding(row),
            encoded=self.images[row].item().tobytes(),
            original_size=_size(self.original_size[row]),
            input_size=_size(self.input_size[row]),
            annotation=self.annotations[row].item().decode() or None,
        )


class _Rows:
    """Rows of a dataset, one by one; h5py's indexing would take as long again to understand the index."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._dataset, self._shape, self._dtype = dataset.id, dataset.shape[1:], dataset.dtype
        self._memory = h5py.h5s.create_simple((1, *self._shape))

    def __getitem__(self, row: int) -> np.ndarray:
        """Array of the dataset's dtype and a row's shape."""
        place = self._dataset.get_space()
        place.select_hyperslab((row,) + (0,) * len(self._shape), (1, *self._shape))
        values = np.empty(self._shape, self._dtype)
        self._dataset.read(self._memory, place, values)
        return values


def held_out_keys(keys: Sequence[str], count: int) -> set[str]:
    """The keys of the images that validation takes: those that hash lowest, the same on every machine.

    Raises:
        InputError: nothing would be left to train on.
    """
    if count >= len(keys):
        raise InputError(f"data.val_images={count} leaves none of the cache's {len(keys)} images to train on")
    return set(sorted(keys, key=lambda key: stable_hash(key, "validation"))[:count])


def files_open_at_most() -> int:
    """Half of the files that the system lets this process open: 512 on most, more than 1 % of SA-1B has shards."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, soft // 2) if soft != resource.RLIM_INFINITY else FILES_OPEN


def refuse_for_now(shard: Path, error: Exception) -> None:
    """Raise `InputError` where what keeps a shard from being read is not the shard."""
    if trouble := passing_trouble(error):
        raise InputError(f"{shard} cannot be read now: {trouble}. The same command goes on from here") from error


def is_complete(directory: Path, info: CacheInfo) -> bool:
    """Whether a cache says that it is finished and has all the shards that it then had."""
    return info.complete and len(shard_paths(directory)) == info.shards


def shard_paths(directory: Path) -> list[Path]:
    """The finished shards of a cache, in order; none where there is no such directory.

    Raises:
        OSError: the directory cannot be read. `Path.glob` would find nothing in it, and all shards would count as lost.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(directory / name for name in names if name.startswith("shard-") and name.endswith(".h5"))


def keys_in(shard: Path, identity: CacheIdentity) -> list[str]:
    """The keys of a shard, in row order.

    Raises:
        InputError: the file is damaged, or of another cache.
    """
    try:
        with open_shard(shard) as file:
            differences = identity_of(file.attrs).differences(identity)
            keys = [key.decode() for key in file["keys"][:]]
    except (OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        refuse_for_now(shard, error)
        raise InputError(
            f"{shard} is damaged: {damage_of(error)}. verify.drop=true of stage=verify puts it aside, and "
            "stage=precompute makes its rows again"
        ) from error
    if differences:
        raise InputError(f"{shard} is of another cache: {'; '.join(differences)}")
    return keys


def _size(stored: np.ndarray) -> tuple[int, int]:
    return int(stored[0]), int(stored[1])
