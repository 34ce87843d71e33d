"""Images in: SA-1B tars as published, any other WebDataset tar, any folder tree of images."""

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from embeddings_cache.annotations import usable_annotation
from embeddings_cache.sources import IMAGE_SUFFIXES, Share, is_remote, relative_key, suffix_of, walk_images
from embeddings_cache.tars import Skipped, image_keys, tar_samples
from students import first_line


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
    shares: Iterable[Share], wanted: Callable[[str], bool] = lambda key: True, skipped: Skipped = lambda key, why: None
) -> Iterator[Sample]:
    """Decode the wanted images of some sources, one at a time.

    Bad samples are reported through `skipped` and passed over: an image that cannot be decoded, JSON that cannot be
    parsed, a key seen before, an annotation without image, a local tar that ends too early.

    Raises:
        InputError: a source that cannot be opened at all, or a download that breaks off.
    """
    seen: set[str] = set()
    for share in shares:
        for raw in _raw_samples(share, wanted, skipped):
            key = raw["__key__"]
            if reason := _no_sample(raw, seen):
                skipped(key, reason)
            if reason is not None:
                continue
            seen.add(key)
            try:
                sample = decode_sample(key, raw)
            except Exception as error:  # Pillow lets many kinds through; one bad sample must not end the run
                skipped(key, reason_of(error))
                continue
            yield sample


def reason_of(error: Exception) -> str:
    """An error of decoding in one line, without the memory address that makes equal reasons differ."""
    return re.sub(r" ?<_io\.BytesIO[^>]*>", "", f"{type(error).__name__}: {first_line(error)}")


def decode_sample(key: str, raw: dict[str, Any]) -> Sample:
    """Undecoded files of one key, by suffix → `Sample`; raises whatever is wrong with the image or the JSON."""
    image = decode_image(next(raw[suffix] for suffix in IMAGE_SUFFIXES if suffix in raw))
    size = (image.shape[0], image.shape[1])
    return Sample(key, image, usable_annotation(raw["json"], size) if "json" in raw else None)


def decode_image(encoded: bytes) -> np.ndarray:
    """Bytes of a jpg, png or webp → RGB uint8 (H, W, 3), turned upright as its EXIF orientation says.

    That is what `cv2.imread` does, which segment-anything's notebooks and scripts read images with: orientation
    applied, alpha dropped, 16 bits cut to the upper 8. Raises what Pillow raises for what is not a whole image.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            gray = np.asarray(upright).astype(np.uint32) >> 8
            return np.repeat(gray.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
        return np.asarray(upright.convert("RGB"))


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


def _raw_samples(share: Share, wanted: Callable[[str], bool], skipped: Skipped) -> Iterator[dict[str, Any]]:
    """Undecoded samples of one share, as WebDataset groups them: `__key__`, and bytes by suffix."""

    def mine(key: str) -> bool:
        return share.holds(key) and wanted(key)

    if os.path.isdir(share.source):
        yield from _folder_samples(share.source, mine, skipped)
    else:
        yield from tar_samples(share.source, mine, skipped)


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


def count_images(shares: list[Share], chosen: Callable[[str], bool]) -> int | None:
    """How many chosen images some local shares hold, from names alone; None if a source is remote.

    For the progress bar: past 16 tars the rest is estimated from their sizes.
    """
    if any(is_remote(share.source) for share in shares):
        return None
    folders = [share for share in shares if os.path.isdir(share.source)]
    tars = [share for share in shares if not os.path.isdir(share.source)]

    def held(share: Share, keys: Iterable[str]) -> int:
        return sum(share.holds(key) and chosen(key) for key in keys)

    looked_at = tars[:16]
    total = sum(held(s, (relative_key(path, s.source) for path in walk_images(s.source))) for s in folders)
    found = sum(held(share, image_keys(share.source)) for share in looked_at)
    size = sum(os.path.getsize(share.source) for share in looked_at)
    scale = sum(os.path.getsize(share.source) for share in tars) / size if size else 0.0
    return total + round(found * scale)
