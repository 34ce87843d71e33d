"""Writing shards: rows go to a temporary file, a full one is flushed, renamed and never touched again."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from embeddings_cache.shards.codec import CacheRow, crc32_of, encode_embedding
from embeddings_cache.shards.format import BYTES, FORMAT, UTF8, VERSION, CacheIdentity, software_versions
from embeddings_cache.system import TEMPORARY, Stopped, publish
from students import InputError

BLOCK = 16
"""Rows whose pictures, keys and sizes are written at once: HDF5 takes about as long for one as for many."""


class ShardWriter:
    """Rolls over a process's shards: `write` rows, then `close`.

    A crash costs the rows of the shard being written and nothing else; leaving the `with` block by an exception
    drops that shard as well, unless it comes from between two rows, as `InputError` and `Stopped` do.
    """

    def __init__(self, directory: Path, identity: CacheIdentity, rank: int, images_per_shard: int) -> None:
        self.directory = directory
        self.identity = identity
        self.rank = rank
        self.images_per_shard = images_per_shard
        self.sequence = 1 + max((int(path.stem[-5:]) for path in directory.glob(f"shard-{rank:05d}-*.h5")), default=-1)
        self._file: h5py.File | None = None
        self._disk: _Disk | None = None
        self._failed = False
        self._rows = 0
        self._waiting: list[CacheRow] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, InputError | Stopped):
            self.close()
        else:
            self.drop()

    def write(self, row: CacheRow) -> None:
        """Append one row.

        Raises:
            InputError: the disk does not take it, being full for instance. The shard being written is then dropped,
                and nothing more is written.
        """
        if self._failed:
            raise RuntimeError("this writer has failed before")
        with self._failing_for_good():
            if self._file is None:
                self._file = self._create()
            self._append(self._file, row)
            if len(self._waiting) == BLOCK:
                self._write_waiting(self._file)
            if self._disk_error:
                raise self._disk_error
        if self._rows == self.images_per_shard:
            self.close()

    def close(self) -> None:
        """Publish the shard being written, if there is one.

        Raises:
            InputError: as `write`.
        """
        if self._file is None:
            return
        with self._failing_for_good():
            self._write_waiting(self._file)
            for dataset in self._file.values():
                dataset.resize(self._rows, axis=0)
            self._file.attrs["images"] = self._rows
            self._file.close()
            self._close_disk()
            publish(self._temporary, self._path)
        self._file = None
        self._rows = 0
        self.sequence += 1

    def drop(self) -> None:
        """Throw the shard being written away, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._disk is not None:
            self._disk.close()
        self._temporary.unlink(missing_ok=True)
        self._rows = 0
        self._waiting = []

    def _append(self, file: h5py.File, row: CacheRow) -> None:
        """Write a row's embedding; the rest of it waits for a block."""
        for name, values in encode_embedding(row.embedding, self.identity.dtype).items():
            file[name][self._rows] = values
        self._rows += 1
        self._waiting.append(row)

    def _write_waiting(self, file: h5py.File) -> None:
        rows, block = self._waiting, slice(self._rows - len(self._waiting), self._rows)
        if not rows:
            return
        for place, row in enumerate(rows, block.start):  # h5py takes pictures of equal length for a matrix
            file["images"][place] = np.frombuffer(row.encoded, dtype=np.uint8)
        file["keys"][block] = [row.key for row in rows]
        file["original_size"][block] = [row.original_size for row in rows]
        file["input_size"][block] = [row.input_size for row in rows]
        file["annotations"][block] = [row.annotation or "" for row in rows]
        file["crc32"][block] = [crc32_of(row) for row in rows]
        self._waiting = []

    @property
    def _disk_error(self) -> OSError | None:
        return self._disk.error if self._disk is not None else None

    def _close_disk(self) -> None:
        assert self._disk is not None
        self._disk.close()
        if self._disk.error:
            raise self._disk.error

    @contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = True
            self.drop()
            cause = self._disk_error or error  # HDF5's own complaint may only follow from the disk's
            if isinstance(cause, OSError):
                raise InputError(
                    f"cannot write to {self.directory}: {cause.strerror or cause}. "
                    "All finished shards are kept; the same command goes on from them"
                ) from error
            raise

    @property
    def _path(self) -> Path:
        return self.directory / f"shard-{self.rank:05d}-{self.sequence:05d}.h5"

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(f"{TEMPORARY}{os.getpid()}-{self._path.name}")

    def _create(self) -> h5py.File:
        self._disk = _Disk(self._temporary)
        file = h5py.File(self._disk, "w")
        rows, shape = self.images_per_shard, self.identity.embedding_shape
        # As long as a full shard has it, and cut when this one ends. A chunk an image: one read gets a row, and a
        # checksum covers it.
        options = {"maxshape": (None, *shape), "chunks": (1, *shape), "fletcher32": True}
        file.create_dataset("embeddings", (rows, *shape), self.identity.dtype, **options)
        if self.identity.dtype == "int8":
            file.create_dataset(
                "scales", (rows, shape[0]), np.float32, maxshape=(None, shape[0]), chunks=(1, shape[0]), fletcher32=True
            )
        for name, dtype in (("images", BYTES), ("keys", UTF8), ("annotations", UTF8)):
            file.create_dataset(name, (rows,), dtype, maxshape=(None,), chunks=(64,))
        for name in ("original_size", "input_size"):
            file.create_dataset(name, (rows, 2), np.int32, maxshape=(None, 2), chunks=(64, 2), fletcher32=True)
        file.create_dataset("crc32", (rows,), np.uint32, maxshape=(None,), chunks=(64,), fletcher32=True)
        file.attrs.update({"format": FORMAT, "version": VERSION})
        for name, value in vars(self.identity).items():
            file.attrs[name] = value
        for name, value in software_versions().items():
            file.attrs[f"software_{name}"] = value
        return file


class _Disk(io.FileIO):
    """A file under HDF5 that never fails: the first error is kept in `error`, and from then on nothing is written.

    HDF5 itself crashes the process when it closes a file for which the disk was full.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        try:
            while self.error is None and len(rest):
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0
