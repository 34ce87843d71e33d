"""Where images lie, which of them are used, and which process reads them; nothing is opened here.

spec → expand_sources → pick_sources → assign_sources → `samples.read_images`
"""

import glob
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from webdataset.shardlists import expand_urls

from embeddings_cache.system import stable_hash
from students import InputError, first_line

UNEVEN = 1.05
"""Bytes of one process's whole tars over the mean; above this, tars are divided instead."""

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Share:
    """A source that one process reads: all of it, or of its wanted keys those from `part` on, every `parts`-th."""

    source: str
    part: int = 0
    parts: int = 1


def expand_sources(spec: str | list[str]) -> list[str]:
    """Every tar and folder that a spec names, in order, without opening any.

    Args:
        spec: one or a list of: a tar's path; a brace pattern (`sa_{000000..000999}.tar`); a glob; an http(s) URL;
            `pipe:COMMAND`, whose output is a tar; a folder. A folder that holds no image but tars stands for those.

    Raises:
        InputError: a glob that matches nothing, or an empty spec.
    """
    sources: list[str] = []
    for pattern in [spec] if isinstance(spec, str) else spec:
        try:
            urls = expand_urls(pattern)
        except (ValueError, AssertionError) as error:
            raise InputError(f"no images: {pattern!r}: {first_line(error)}") from error
        for url in urls:
            sources += [url] if is_remote(url) else _expand_local(url)
    if not sources:
        raise InputError(f"no images: {spec!r} names no file")
    return list(dict.fromkeys(sources))


def pick_sources(sources: list[str], fraction: float) -> tuple[list[str], float]:
    """Choose the tars to open for a fraction of the images: 1 % of 1,000 tars opens 10.

    The choice depends on the tars' file names alone, so that a mirror or another mount gives the same one.

    Returns:
        The chosen sources, in order, and the fraction of their keys that `keep_key` must keep.

    Raises:
        InputError: chosen sources that are not there.
    """
    count = max(1, math.ceil(len(sources) * fraction - 1e-9))
    ranked = sorted(sources, key=lambda source: (stable_hash(_tar_name(source), "tar"), source))
    chosen = set(ranked[:count])
    picked = [source for source in sources if source in chosen]
    missing = [source for source in picked if not is_remote(source) and not os.path.exists(source)]
    if missing:
        first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(f"no images: {len(missing)} of {len(picked)} chosen tars or folders do not exist: {first}")
    return picked, min(1.0, fraction * len(sources) / count)


def keep_key(key: str, fraction: float) -> bool:
    """Whether a key is among the fraction that is kept; the same on every machine."""
    return stable_hash(key, "key") < fraction


def assign_sources(sources: list[str], rank: int, ranks: int, resumed: bool = False) -> list[Share]:
    """What one of several processes reads, so that none has much more to do than another.

    Tars go round whole while they last. The rest, folders, and everything local if whole tars would be uneven, is
    divided: every process goes through it, and takes each `ranks`-th image.

    Args:
        sources: from `pick_sources`.
        rank: of this process; ranks: how many there are.
        resumed: some images are there already, and nobody knows of which tars: then local tars are divided too.
    """
    tars = [s for s in sources if not is_remote(s) and not os.path.isdir(s)]
    sizes = {tar: os.path.getsize(tar) for tar in tars}
    tars.sort(key=lambda tar: -sizes[tar])
    owners = _go_round(tars, ranks)
    loads = [sum(sizes[tar] for tar in owners if owners[tar] == each) for each in range(ranks)]
    if resumed or max(loads) > UNEVEN * sum(loads) / ranks:
        owners = {}
    owners |= _go_round([source for source in sources if is_remote(source)], ranks)
    mine = [Share(source) for source in sources if owners.get(source) == rank]
    divided = [source for source in sources if source not in owners]
    # Who takes the first image differs from source to source, so that folders of one image go round too.
    return mine + [Share(source, (rank + number) % ranks, ranks) for number, source in enumerate(divided)]


def _go_round(sources: list[str], ranks: int) -> dict[str, int]:
    """Who gets which source, as many each, 0, 1, 2, 2, 1, 0, 0, 1, ...; what does not go round is left out."""
    owners = {}
    for number, source in enumerate(sources[: len(sources) - len(sources) % ranks]):
        turn, place = divmod(number, ranks)
        owners[source] = ranks - 1 - place if turn % 2 else place
    return owners


def is_remote(source: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", source) is not None


def walk_images(root: str) -> Iterator[Path]:
    """Image files below a folder, links followed once, in an order that does not depend on the file system."""
    visited = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        for name in sorted(files):
            if suffix_of(Path(name)) in IMAGE_SUFFIXES and not is_hidden(name):
                yield Path(folder, name)


def relative_key(path: Path, root: str) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def suffix_of(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def is_hidden(name: str) -> bool:
    """Hidden files, the `._name` that macOS adds, and WebDataset's `__meta__` files are no samples."""
    return os.path.basename(name).startswith((".", "__"))


def _expand_local(path: str) -> list[str]:
    if glob.has_magic(path) and not os.path.exists(path):
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise InputError(f"no images: nothing matches {path!r}")
        return matches
    if os.path.isdir(path) and not any(True for _ in walk_images(path)):
        tars = sorted(str(tar) for tar in Path(path).rglob("*.tar"))
        if not tars:
            raise InputError(f"no images: neither an image nor a tar below {path!r}")
        return tars
    return [path]


def _tar_name(source: str) -> str:
    """`sa_000020.tar` from a path, a URL or a pipe's command line; the whole source where none is named."""
    names = re.findall(r"[^/\s=?&'\"]+\.tar", source)
    return names[-1] if names else source
