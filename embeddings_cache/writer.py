"""Writing shards: rows go to a temporary file, a full one is flushed, renamed and never touched again."""

from pathlib import Path

import h5py
import numpy as np

from embeddings_cache.codec import CacheRow
from embeddings_cache.files import TEMPORARY, publish
from embeddings_cache.format import BYTES, FORMAT, UTF8, VERSION, CacheIdentity, software_versions
from students import InputError


class ShardWriter:
    """Rolls over a process's shards: `write` rows, then `close`.

    A crash costs the rows of the shard being written and nothing else; leaving the `with` block by an exception
    drops that shard as well, unless it is an `InputError`: that comes from between two rows.
    """

    def __init__(self, directory: Path, identity: CacheIdentity, rank: int, images_per_shard: int) -> None:
        self.directory = directory
        self.identity = identity
        self.rank = rank
        self.images_per_shard = images_per_shard
        self.sequence = 1 + max((int(path.stem[-5:]) for path in directory.glob(f"shard-{rank:05d}-*.h5")), default=-1)
        self._file: h5py.File | None = None
        self._rows = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, InputError):
            self.close()
        elif self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def write(self, row: CacheRow) -> None:
        """Append one row."""
        if self._file is None:
            self._file = self._create()
        self._rows += 1
        for dataset in self._file.values():
            dataset.resize(self._rows, axis=0)
        last = self._rows - 1
        self._file["embeddings"][last] = row.embedding
        self._file["images"][last] = np.frombuffer(row.encoded, dtype=np.uint8)
        self._file["keys"][last] = row.key
        self._file["original_size"][last] = row.original_size
        self._file["input_size"][last] = row.input_size
        self._file["annotations"][last] = row.annotation or ""
        if self._rows == self.images_per_shard:
            self.close()

    def close(self) -> None:
        """Publish the shard being written, if there is one."""
        if self._file is None:
            return
        self._file.attrs["images"] = self._rows
        self._file.close()
        publish(self._temporary, self._path)
        self._file = None
        self._rows = 0
        self.sequence += 1

    @property
    def _path(self) -> Path:
        return self.directory / f"shard-{self.rank:05d}-{self.sequence:05d}.h5"

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(f"{TEMPORARY}{self._path.name}")

    def _create(self) -> h5py.File:
        file = h5py.File(self._temporary, "w")
        shape = self.identity.embedding_shape
        # A chunk an image: one read gets a row, and a checksum covers it.
        file.create_dataset(
            "embeddings", (0, *shape), self.identity.dtype, maxshape=(None, *shape), chunks=(1, *shape), fletcher32=True
        )
        for name, dtype in (("images", BYTES), ("keys", UTF8), ("annotations", UTF8)):
            file.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(64,))
        for name in ("original_size", "input_size"):
            file.create_dataset(name, (0, 2), np.int32, maxshape=(None, 2), chunks=(64, 2))
        file.attrs.update({"format": FORMAT, "version": VERSION})
        for name, value in vars(self.identity).items():
            file.attrs[name] = value
        for name, value in software_versions().items():
            file.attrs[f"software_{name}"] = value
        return file
