"""Is a cache what it claims to be? Every checksum, count and key, and a sample of rows against the teacher."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from embeddings_cache.shards.codec import CacheRow, crc32_of
from embeddings_cache.shards.format import CacheIdentity, identity_of, read_info
from embeddings_cache.shards.reader import OpenShard, damage_of, shard_paths
from embeddings_cache.system import sole_user, stable_hash
from students import CheckFailed, InputError

LARGEST_ERROR = 0.05
"""Relative, between an embedding of the cache and one made again: int8, bfloat16 and another device stay well below."""


class DamagedCache(CheckFailed):
    """Something is wrong with a cache; says what and what to do."""


@dataclass
class Verdict:
    """What was found in one shard: its keys, and what is wrong with it."""

    path: Path
    keys: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    recomputed: list[float] = field(default_factory=list)
    """Relative errors of the rows that the teacher embedded again."""

    def __str__(self) -> str:
        rows = f"{len(self.keys)} rows"
        if self.recomputed:
            rows += f", {len(self.recomputed)} made again: off by {max(self.recomputed):.2g} at most"
        return f"{self.path.name}  {rows}  {'DAMAGED: ' + '; '.join(self.problems) if self.problems else 'ok'}"


Embed = Callable[[CacheRow], torch.Tensor]
"""Makes a row's embedding again, by the teacher: float32 (C, h, w), on the CPU."""


def verify_cache(directory: Path, embed: Embed | None, recompute: int, drop: bool = False) -> None:
    """Check a cache from end to end and print a verdict on each shard.

    Args:
        directory: the cache.
        embed: the teacher; None leaves the sample out.
        recompute: rows to embed again.
        drop: remove damaged shards.

    Raises:
        InputError: there is no cache at `directory`.
        DamagedCache: at least one shard is damaged, rows are missing, or there are more than there should be.
    """
    info = read_info(directory)
    if info is None:
        raise InputError(f"the cache at {directory} does not exist: run stage=precompute")
    paths = shard_paths(directory)
    verdicts = [Verdict(path) for path in paths]
    for verdict in verdicts:
        _read_keys(verdict, info.identity)
    keys = sorted({key for verdict in verdicts for key in verdict.keys}, key=lambda key: stable_hash(key, "verify"))
    sample = set(keys[:recompute])
    for verdict in tqdm(verdicts, desc="verify", unit=" shards", mininterval=1.0, leave=False):
        if not verdict.problems:
            _verify_rows(verdict, info.identity, embed, sample)
        tqdm.write(str(verdict))
    found = Counter(key for verdict in verdicts for key in verdict.keys)
    wrong = [f"{sum(bool(v.problems) for v in verdicts)} of {len(paths)} shards are damaged"]
    wrong = wrong if any(verdict.problems for verdict in verdicts) else []
    if info.complete and len(paths) != info.shards:
        wrong.append(f"{info.shards} shards were made, {len(paths)} are there")
    if info.complete and len(found) != info.images:
        wrong.append(f"{info.images} images were cached, {len(found)} are there")
    if not info.complete:
        wrong.append("it is not finished")
    damaged = [verdict.path for verdict in verdicts if verdict.problems]
    if drop and damaged:
        with sole_user(directory):
            for path in damaged:
                path.unlink()
    if wrong:
        remedy = "stage=precompute makes the missing rows again"
        if damaged and not drop:
            remedy = f"verify.drop=true removes what is damaged, then {remedy}"
        raise DamagedCache(f"the cache at {directory} is damaged: {'; '.join(wrong)}. {remedy}")
    twice = sum(count > 1 for count in found.values())
    note = f", {twice} of them twice (the first row counts)" if twice else ""
    print(f"verify: {len(found)} images in {len(paths)} shards{note}, all as they should be")


def _read_keys(verdict: Verdict, identity: CacheIdentity) -> None:
    """Keys of a shard, and what is wrong with it as a whole."""
    try:
        with h5py.File(verdict.path, "r") as file:
            verdict.problems += identity_of(file.attrs).differences(identity)
            verdict.keys = [key.decode() for key in file["keys"][:]]
            counts = {name: len(dataset) for name, dataset in file.items()}
            expected = int(file.attrs["images"])
    except Exception as error:  # HDF5 has no one kind for damage
        verdict.problems.append(damage_of(error))
        return
    verdict.problems += [
        f"{name} has {count} rows, not {expected}" for name, count in counts.items() if count != expected
    ]
    verdict.problems += [f"{key} is there {count} times" for key, count in Counter(verdict.keys).items() if count > 1]


def _verify_rows(verdict: Verdict, identity: CacheIdentity, embed: Embed | None, sample: set[str]) -> None:
    try:
        shard = OpenShard(verdict.path)
        # Shards from before it was introduced have none; that is no damage.
        sums = shard.file["crc32"][:].tolist() if "crc32" in shard.file else [None] * len(verdict.keys)
    except Exception as error:
        verdict.problems.append(damage_of(error))
        return
    with shard.file:
        for number, key in enumerate(verdict.keys):
            try:
                row = shard.row(number, key)
                problem = _row_problem(row, sums[number], identity)
                if not problem and embed is not None and key in sample:
                    off = relative_error(row, embed(row))
                    verdict.recomputed.append(off)
                    problem = f"the teacher makes another embedding, off by {off:.2g}" if off > LARGEST_ERROR else ""
            except (InputError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                problem = damage_of(error)
            if problem:
                verdict.problems.append(f"row {number} ({key}): {problem}")


def _row_problem(row: CacheRow, crc32: int | None, identity: CacheIdentity) -> str:
    """What is wrong with a row, or nothing; raises whatever is wrong with its picture."""
    if crc32 is not None and crc32_of(row) != crc32:
        return "the checksum of key, picture and annotation does not hold"
    if row.embedding.shape != identity.embedding_shape or not np.isfinite(row.embedding).all():
        return "the embedding is not finite, or of another shape"
    if (shape := row.pixels().shape[:2]) != row.input_size:
        return f"the picture is {shape}, not {row.input_size}"
    return ""


def relative_error(row: CacheRow, again: torch.Tensor) -> float:
    """‖cached − made again‖ / ‖made again‖."""
    return ((torch.from_numpy(row.embedding).float() - again).norm() / again.norm()).item()
