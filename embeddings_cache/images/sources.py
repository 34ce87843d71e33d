"""Where images lie, which of them are used, and which process reads them; nothing is opened here.

spec → expand_sources → pick_sources → assign_sources → `samples.read_images`
"""

import math
import os
import re
from dataclasses import dataclass

from webdataset.shardlists import expand_urls

from embeddings_cache.images.archives import is_archive
from embeddings_cache.images.folders import is_folder_like, is_pattern, top_matches, walk_files
from embeddings_cache.images.names import is_hidden, is_picture
from embeddings_cache.images.remote import expand_remote, is_remote
from embeddings_cache.system import stable_hash
from students import InputError, first_line

UNEVEN = 1.05
"""Bytes of one process's whole tars over the mean; above this, tars are divided instead."""


@dataclass(frozen=True)
class Share:
    """A source that one process reads: all of it, or of its wanted keys those from `part` on, every `parts`-th."""

    source: str
    part: int = 0
    parts: int = 1


def expand_sources(spec: str | list[str]) -> list[str]:
    """Every archive, and every place of pictures, that a spec names, in order, without opening any.

    Args:
        spec: one or a list of: a tar's or a zip's path; a folder; a glob of tars, zips, folders or pictures; a brace
            pattern (`sa_{000000..000999}.tar`); a tar's URL that fsspec reads, also as a glob (`s3://bucket/*.tar`);
            `pipe:COMMAND`, whose output is a tar. A folder that holds no picture but archives stands for those. What
            is there under its name is no pattern.

    Returns:
        Paths, URLs and commands; pictures that a glob matches are one source, the glob.

    Raises:
        InputError: a glob that matches nothing that can be read, or an empty spec.
    """
    sources: list[str] = []
    for given in [spec] if isinstance(spec, str) else spec:
        pattern = os.path.expanduser(given)
        if os.path.exists(pattern):
            sources += _expand_local(pattern)
            continue
        try:
            urls = expand_urls(pattern)
        except (ValueError, AssertionError) as error:
            raise InputError(f"no images: {pattern!r}: {first_line(error)}") from error
        for url in urls:
            sources += expand_remote(url) if is_remote(url) else _expand_local(url)
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
    missing = [s for s in picked if not (is_remote(s) or os.path.exists(s) or is_pattern(s))]
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
    tars = [s for s in sources if not is_remote(s) and not is_folder_like(s)]
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


def _expand_local(path: str) -> list[str]:
    if is_pattern(path):
        matches = top_matches(path)
        if not matches:
            raise InputError(f"no images: nothing matches {path!r}")
        pictures = [path] if any(is_picture(match) for match in matches) else []
        archives = [match for match in matches if is_archive(match) and os.path.isfile(match)]
        folders = [source for match in matches if os.path.isdir(match) for source in _expand_folder(match)]
        found = pictures + archives + folders
        if not found:
            raise InputError(f"no images: {path!r} matches neither picture, tar, zip nor folder, but {matches[0]}")
        return found
    if os.path.isdir(path):
        if not (found := _expand_folder(path)):
            raise InputError(f"no images: neither an image nor a tar or zip below {path!r}")
        return found
    return [path]


def _expand_folder(path: str) -> list[str]:
    """Itself where there are pictures in it, or the archives in it; nothing where there is neither."""
    if any(is_picture(str(file)) for file in walk_files(path)):
        return [path]
    return sorted(str(file) for file in walk_files(path) if is_archive(file.name) and not is_hidden(file.name))


def _tar_name(source: str) -> str:
    """`sa_000020.tar` from a path, a URL or a pipe's command line; the whole source where none is named."""
    names = re.findall(r"[^/\s=?&'\"]+\.tar", source)
    return names[-1] if names else source
