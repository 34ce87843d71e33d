"""Is a cache what it claims to be? Every checksum, count and key, and a sample of rows against the teacher."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from embeddings_cache.shards.codec import CacheRow, crc32_of
from embeddings_cache.shards.format import CacheIdentity, CacheInfo, identity_of, read_info
from embeddings_cache.shards.reader import OpenShard, shard_paths
from embeddings_cache.shards.trouble import damage_of, open_shard, passing_trouble
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
    trouble: str = ""
    """What keeps it from being read, and is not the shard."""
    recomputed: list[float] = field(default_factory=list)
    """Relative errors of the rows that the teacher embedded again."""

    def __str__(self) -> str:
        if self.trouble:
            return f"{self.path.name}  CANNOT BE READ NOW: {self.trouble}"
        rows = f"{len(self.keys)} rows"
        if self.recomputed:
            rows += f", {len(self.recomputed)} made again: off by {max(self.recomputed):.2g} at most"
        return f"{self.path.name}  {rows}  {'DAMAGED: ' + '; '.join(self.problems) if self.problems else 'ok'}"

    def failed(self, error: Exception, where: str = "") -> None:
        """Note an error: as damage, or, where it will pass, as trouble."""
        if trouble := passing_trouble(error):
            self.trouble = trouble
        else:
            self.problems.append(f"{where}{damage_of(error)}")


Embed = Callable[[CacheRow], torch.Tensor]
"""Makes a row's embedding again, by the teacher: float32 (C, h, w), on the CPU."""


def verify_cache(directory: Path, embed: Embed | None, recompute: int, drop: bool = False) -> None:
    """Check a cache from end to end and print a verdict on each shard.

    Args:
        directory: the cache.
        embed: the teacher; None leaves the sample out.
        recompute: rows to embed again.
        drop: put damaged shards aside, into `damaged/` of the cache.

    Raises:
        InputError: there is no cache at `directory`.
        DamagedCache: at least one shard is damaged, rows are missing, or there are more than there should be.
        CheckFailed: a shard cannot be read now, for a reason that is not the shard; all others are as they should be.
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
        if not verdict.problems and not verdict.trouble:
            _verify_rows(verdict, info.identity, embed, sample)
        tqdm.write(str(verdict))
    found = Counter(key for verdict in verdicts for key in verdict.keys)
    damaged = [verdict.path for verdict in verdicts if verdict.problems]
    unread = [verdict for verdict in verdicts if verdict.trouble]
    if drop and damaged:
        with sole_user(directory):
            for path in damaged:
                _put_aside(path)
    wrong = [f"{len(damaged)} of {len(paths)} shards are damaged"] if damaged else []
    wrong += _miscounts(info, len(paths), None if unread else len(found))
    later = [f"{len(unread)} of {len(paths)} shards cannot be read now: {unread[0].trouble}"] if unread else []
    if wrong:
        remedy = "stage=precompute makes the missing rows again"
        if damaged:
            remedy = f"{'They lie in damaged/ now' if drop else 'verify.drop=true puts them aside'}; {remedy}"
        raise DamagedCache(f"the cache at {directory} is damaged: {'; '.join(wrong + later)}. {remedy}")
    if unread:
        raise CheckFailed(f"the cache at {directory} cannot be verified: {later[0]}. That is no damage; try again")
    twice = sum(count > 1 for count in found.values())
    note = f", {twice} of them twice (the first row counts)" if twice else ""
    print(f"verify: {len(found)} images in {len(paths)} shards{note}, all as they should be")


def _miscounts(info: CacheInfo, shards: int, images: int | None) -> list[str]:
    """Where a cache does not hold as much as it says; None: not all images could be counted."""
    if not info.complete:
        return ["it is not finished"]
    wrong = [f"{info.shards} shards were made, {shards} are there"] if shards != info.shards else []
    if images not in (None, info.images):
        wrong.append(f"{info.images} images were cached, {images} are there")
    return wrong


def _put_aside(path: Path) -> None:
    """Move a shard to `damaged/` beside it, under a name that is free: what a later version can save is not lost."""
    aside = path.parent / "damaged"
    aside.mkdir(exist_ok=True)
    names = (f"{path.stem}{f'-{number}' if number else ''}{path.suffix}" for number in count())
    os.replace(path, next(aside / name for name in names if not (aside / name).exists()))


def _read_keys(verdict: Verdict, identity: CacheIdentity) -> None:
    """Keys of a shard, and what is wrong with it as a whole."""
    try:
        with open_shard(verdict.path) as file:
            verdict.problems += identity_of(file.attrs).differences(identity)
            verdict.keys = [key.decode() for key in file["keys"][:]]
            counts = {name: len(dataset) for name, dataset in file.items()}
            expected = int(file.attrs["images"])
    except Exception as error:  # HDF5 has no one kind for damage
        verdict.failed(error)
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
        verdict.failed(error)
        return
    with shard.file:
        for number, key in enumerate(verdict.keys):
            where = f"row {number} ({key}): "
            try:
                row = shard.row(number, key)
                problem = _row_problem(row, sums[number], identity)
            except Exception as error:
                verdict.failed(error, where)
                continue
            if not problem and embed is not None and key in sample:
                off = relative_error(row, embed(row))  # what the teacher raises says nothing of the shard
                verdict.recomputed.append(off)
                problem = f"the teacher makes another embedding, off by {off:.2g}" if off > LARGEST_ERROR else ""
            if problem:
                verdict.problems.append(where + problem)


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
