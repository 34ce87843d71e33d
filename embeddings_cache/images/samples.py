"""Images in: SA-1B tars as published, any other WebDataset tar, any folder tree of images."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from embeddings_cache.images.annotations import usable_annotation
from embeddings_cache.images.decoding import decode_image, reason_of
from embeddings_cache.images.skipped import Skipped
from embeddings_cache.images.sources import IMAGE_SUFFIXES, Share, is_remote, relative_key, suffix_of, walk_images
from embeddings_cache.images.tars import first_image_keys, tar_samples
from embeddings_cache.system import map_ahead

LISTED_MEMBERS = 2000
"""Files of a tar whose names are read to count its images; SA-1B's have some 22,000."""


@dataclass(frozen=True)
class Sample:
    """One image as it came: `key` names it, `image` is RGB uint8 (H, W, 3), `annotation` SA-1B's JSON if it has one."""

    key: str
    image: np.ndarray
    annotation: str | None

    @property
    def original_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[0], self.image.shape[1]


def read_images(
    shares: Iterable[Share],
    wanted: Callable[[str], bool] = lambda key: True,
    skipped: Skipped = lambda key, why: None,
    threads: int = 1,
    divided: dict[str, int] | None = None,
) -> Iterator[Sample]:
    """Decode the wanted images of some sources, in order, by some threads.

    `divided` is filled with the number of wanted keys in each source that several processes divide: they must have
    found the same, or some image is read twice or not at all.

    Bad samples are reported through `skipped` and passed over: an image that cannot be decoded, JSON that cannot be
    parsed, a key seen before, an annotation without image, a local tar that ends too early.

    Raises:
        InputError: a source that cannot be opened at all, or a download that breaks off.
    """
    raw_samples = _unique_samples(shares, wanted, skipped, {} if divided is None else divided)
    for sample in map_ahead(_decoded, raw_samples, threads, ahead=2 * threads):
        if isinstance(sample, Sample):
            yield sample
        else:
            skipped(*sample)


def _unique_samples(
    shares: Iterable[Share], wanted: Callable[[str], bool], skipped: Skipped, divided: dict[str, int]
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()

    def mine(share: Share, positions: dict[str, int], key: str) -> bool:
        return wanted(key) and positions.setdefault(key, len(positions)) % share.parts == share.part

    for share in shares:
        positions: dict[str, int] = {}  # of wanted keys: the same in every process that reads this source
        for raw in _raw_samples(share.source, partial(mine, share, positions), skipped):
            key = raw["__key__"]
            if reason := _no_sample(raw, seen):
                skipped(key, reason)
            if reason is None:
                seen.add(key)
                yield raw
        if share.parts > 1:
            divided[share.source] = len(positions)


def _decoded(raw: dict[str, Any]) -> Sample | tuple[str, str]:
    """The sample, or its key and why it cannot be had."""
    try:
        return decode_sample(raw["__key__"], raw)
    except Exception as error:  # Pillow lets many kinds through; one bad sample must not end the run
        return raw["__key__"], reason_of(error)


def decode_sample(key: str, raw: dict[str, Any]) -> Sample:
    """Undecoded files of one key, by suffix → `Sample`; raises whatever is wrong with the image or the JSON."""
    image = decode_image(next(raw[suffix] for suffix in IMAGE_SUFFIXES if suffix in raw))
    size = (image.shape[0], image.shape[1])
    return Sample(key, image, usable_annotation(raw["json"], size) if "json" in raw else None)


def _no_sample(raw: dict[str, Any], seen: set[str]) -> str | None:
    """Why a group of files is no sample: a reason, "" for what is not meant to be one, None if it is one."""
    suffixes = {suffix for suffix in raw if not suffix.startswith("__")}
    images = suffixes & set(IMAGE_SUFFIXES)
    dotted = [suffix for suffix in suffixes if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    if not images and not dotted and "json" not in suffixes:
        return ""  # a README or the like
    if not raw["__key__"].isprintable():
        return "its name is not printable text"
    if not images and dotted:
        return f"no image: WebDataset splits names at the first dot, and {dotted[0]!r} is no kind of image"
    if not images:
        apart = "; its image lies elsewhere in the tar, they must lie together" if raw["__key__"] in seen else ""
        return f"annotation without image{apart}"
    return "key seen before" if raw["__key__"] in seen else None


def _raw_samples(source: str, mine: Callable[[str], bool], skipped: Skipped) -> Iterator[dict[str, Any]]:
    """Undecoded samples of one source, as WebDataset groups them: `__key__`, and bytes by suffix."""
    if os.path.isdir(source):
        yield from _folder_samples(source, mine, skipped)
    else:
        yield from tar_samples(source, mine, skipped)


def _folder_samples(root: str, mine: Callable[[str], bool], skipped: Skipped) -> Iterator[dict[str, Any]]:
    for path in walk_images(root):
        key = relative_key(path, root)
        if not mine(key):
            continue
        annotation = path.with_suffix(".json")
        try:
            raw: dict[str, Any] = {"__key__": key, suffix_of(path): path.read_bytes()}
            if annotation.is_file():
                raw["json"] = annotation.read_bytes()
        except OSError as error:
            skipped(key, f"{type(error).__name__}: {error.strerror}")
            continue
        yield raw


def count_images(sources: list[str], wanted: Callable[[str], bool]) -> int | None:
    """How many wanted images some local sources hold, from names alone; None if one is remote.

    Large tars and many tars are estimated: from the beginnings of 16 of them, and from their sizes.
    """
    if any(map(is_remote, sources)):
        return None
    folders, tars = [s for s in sources if os.path.isdir(s)], [s for s in sources if not os.path.isdir(s)]
    total = sum(wanted(relative_key(path, folder)) for folder in folders for path in walk_images(folder))
    found = listed_bytes = 0.0
    for tar in tars[:: max(1, len(tars) // 16)]:
        keys, share = first_image_keys(tar, LISTED_MEMBERS)
        found += sum(map(wanted, keys))
        listed_bytes += share * os.path.getsize(tar)
    scale = sum(map(os.path.getsize, tars)) / listed_bytes if listed_bytes else 0.0
    return total + round(found * scale)
