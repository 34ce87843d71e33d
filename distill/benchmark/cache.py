"""Reading a cache: rows in random order against np.memmap on the same bytes; opening one of 1 % of SA-1B's size."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
import torch
from tqdm import trange

from distill.benchmark.machine import cost_alone, machine
from distill.benchmark.timing import interleave, spread, timed
from embeddings_cache.images import fingerprint
from embeddings_cache.shards import (
    DTYPES,
    CacheIdentity,
    CacheInfo,
    CacheRow,
    EmbeddingsCache,
    ShardWriter,
    encode_pixels,
    open_shard,
    shard_paths,
)
from embeddings_cache.system import write_json
from students import InputError

MAPPED = "np.memmap"
GIB = 2**30
ROWS_PER_SHARD = 256
READ_PER_SHARD = 4
"""Rows in each shard of the cache that is read, so that it has many: in a real one each row is in another shard."""


@dataclass
class CacheBenchmark:
    rows: int = 256  # images in the cache that is read; the system keeps files of this size in memory
    image_size: int = 1024  # side of the teacher's input; the embedding is 256 x S/16 x S/16
    dtype: str = "float16"  # how embeddings are stored: float16 or int8
    rounds: int = 5  # times that all rows are read, in turn with np.memmap
    open_rows: int = 112_000  # images in the cache that is only opened: 1 % of SA-1B
    dir: str | None = None  # where to make both (they are removed again); default: the system's temporary folder
    out: str = "benchmark.json"  # where the numbers go


def benchmark_cache(settings: CacheBenchmark) -> dict[str, Any]:
    """Measure, and return what goes to `benchmark.json`.

    Raises:
        InputError: a setting that makes no sense.
    """
    if settings.dtype not in DTYPES:
        raise InputError(f"dtype={settings.dtype} is not known; known: {', '.join(DTYPES)}")
    with TemporaryDirectory(dir=settings.dir, prefix="cache-benchmark-") as directory:
        rows = _benchmark_reading(settings, Path(directory))
    with TemporaryDirectory(dir=settings.dir, prefix="cache-benchmark-") as directory:
        make_light_cache(Path(directory), settings.open_rows)
        rows.append(_benchmark_opening(settings, Path(directory)))
    return {"settings": vars(settings), "machine": machine(torch.device("cpu")), "baseline": MAPPED, "rows": rows}


def _benchmark_reading(settings: CacheBenchmark, directory: Path) -> list[dict[str, Any]]:
    make_cache(directory, settings)
    cache = EmbeddingsCache(directory)
    order = [int(index) for index in np.random.default_rng(0).permutation(len(cache))]
    results = []
    for what, pieces, read in (
        ("embeddings", embedding_alone, cache.embedding),
        ("whole rows", whole_row, cache.__getitem__),
    ):
        mapped, ends = map_plainly(directory / "plain.bin", cache, pieces)
        starts = [0, *ends[:-1]]

        def read_mapped(mapped: np.memmap = mapped, starts: list[int] = starts, ends: list[int] = ends) -> None:
            for index in order:
                np.array(mapped[starts[index] : ends[index]])

        def read_rows(read: Callable[[int], object] = read) -> None:
            for index in order:
                read(index)

        passes: dict[str, Callable[[], object]] = {MAPPED: read_mapped, "cache": read_rows}
        cpu = torch.device("cpu")
        times = interleave({name: timed(run, cpu) for name, run in passes.items()}, settings.rounds, MAPPED)
        results += [
            {
                "name": f"{len(cache)} {what} in random order",
                "backend": name,
                **took.as_json(),
                "GiB_per_s": round(mapped.nbytes / GIB / took.median, 3),
                "of_memmap": took.speed_up,
            }
            for name, took in times.items()
        ]
    return results


def _benchmark_opening(settings: CacheBenchmark, directory: Path) -> dict[str, Any]:
    EmbeddingsCache(directory)  # the files are in the system's memory from here on
    cost = cost_alone(partial(_open, directory))
    shards = len(shard_paths(directory))
    return {
        "name": f"open {settings.open_rows} rows in {shards} shards",
        "backend": "cache",
        **spread([cost.seconds]),
        "added_bytes": cost.added_bytes,
    }


def _open(directory: Path) -> Callable[[], object]:
    return partial(EmbeddingsCache, directory)


def make_cache(directory: Path, settings: CacheBenchmark) -> None:
    """A finished cache of random embeddings and noisy pictures."""
    rng = np.random.default_rng(0)
    side, cells = settings.image_size, settings.image_size // 16
    identity = made_up_identity((256, cells, cells), settings.dtype, side)
    picture = rng.integers(0, 256, (side * 2 // 3 // 8, side // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    encoded = encode_pixels(picture, 95)
    with ShardWriter(directory, identity, 0, READ_PER_SHARD) as writer:
        for number in trange(settings.rows, desc="rows", unit=" rows", leave=False):
            embedding = rng.standard_normal((256, cells, cells), dtype=np.float32).astype(np.float16)
            size = (picture.shape[0], picture.shape[1])
            writer.write(CacheRow(f"sa_{number}", embedding, encoded, size, size, "x" * 70_000))
    _finish(directory, identity, settings.rows)


def make_light_cache(directory: Path, rows: int) -> None:
    """A finished cache with as many keys and shards as a real one, and next to nothing in them."""
    identity = made_up_identity((1, 1, 1), "float16", 16)
    with ShardWriter(directory, identity, 0, ROWS_PER_SHARD) as writer:
        for _ in range(ROWS_PER_SHARD):
            writer.write(CacheRow("", np.zeros((1, 1, 1), np.float16), b"", (1, 1), (1, 1), None))
    first = shard_paths(directory)[0]
    numbers = range(0, rows, ROWS_PER_SHARD)
    for shard, start in enumerate(numbers):
        path = directory / f"shard-{shard:05d}-00001.h5"
        shutil.copyfile(first, path)
        with h5py.File(path, "r+") as file:
            count = min(ROWS_PER_SHARD, rows - start)
            for dataset in file.values():
                dataset.resize(count, axis=0)
            file.attrs["images"] = count
            file["keys"][:] = [f"sa_{start + row:08d}" for row in range(count)]
    first.unlink()
    _finish(directory, identity, rows)


def made_up_identity(shape: tuple[int, int, int], dtype: str, side: int) -> CacheIdentity:
    """Of a cache that nobody will train on: embeddings (C, h, w) stored as `dtype`, pictures of `side` pixels."""
    return CacheIdentity("vit_h", "0" * 64, "float32", side, shape, dtype, 95, fingerprint(), "made up", 1.0)


def _finish(directory: Path, identity: CacheIdentity, rows: int) -> None:
    info = CacheInfo(identity, complete=True, images=rows, shards=len(shard_paths(directory)))
    write_json(directory / "cache.json", info.as_json())


def map_plainly(
    path: Path, cache: EmbeddingsCache, pieces: Callable[[h5py.File, int], list[bytes]]
) -> tuple[np.memmap, list[int]]:
    """The very bytes that the shards hold, in the order of the cache's rows and without format; where each row ends."""
    rows: dict[str, bytes] = {}
    for shard in cache.shards:
        with open_shard(shard) as file:
            rows |= {key.decode(): b"".join(pieces(file, row)) for row, key in enumerate(file["keys"][:])}
    with path.open("wb") as plain:
        ends = [plain.write(rows[key]) and plain.tell() for key in cache.keys]
    return np.memmap(path, np.uint8, "r"), ends


def embedding_alone(file: h5py.File, row: int) -> list[bytes]:
    """What a shard keeps of an embedding."""
    return [file[name][row].tobytes() for name in ("embeddings", "scales") if name in file]


def whole_row(file: h5py.File, row: int) -> list[bytes]:
    """Embedding, picture and annotation."""
    return [*embedding_alone(file, row), file["images"][row].tobytes(), file["annotations"][row]]
