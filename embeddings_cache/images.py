"""Images in: SA-1B tars as published, any other WebDataset tar, any folder tree of images.

A pipeline of small stages, each a function that can be tried alone:

    spec → expand_sources → pick_sources → assign_sources → read_images → Sample
"""

import glob
import hashlib
import io
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image, ImageOps
from webdataset.shardlists import expand_urls

from embeddings_cache.annotations import usable_annotation
from students import InputError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


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


@dataclass(frozen=True)
class Share:
    """A source, and which of its keys one process reads: those whose hash falls in part `part` of `parts`."""

    source: str
    part: int = 0
    parts: int = 1

    def holds(self, key: str) -> bool:
        """Whether the key belongs to this share."""
        return int(stable_hash(key, "rank") * self.parts) == self.part


Skipped = Callable[[str, str], None]
"""Called with the key (or the source) and the reason for everything that is passed over."""


def stable_hash(text: str, purpose: str) -> float:
    """A number in [0, 1) that is the same on every machine; hashes of different purposes are independent."""
    digest = hashlib.sha256(f"{purpose}:{text}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


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
        for url in expand_urls(pattern):
            sources += [url] if _is_remote(url) else _expand_local(url)
    if not sources:
        raise InputError(f"no images: {spec!r} names no file")
    return sources


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
    missing = [source for source in picked if not _is_remote(source) and not os.path.exists(source)]
    if missing:
        first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(f"no images: {len(missing)} of {len(picked)} chosen tars or folders do not exist: {first}")
    return picked, min(1.0, fraction * len(sources) / count)


def keep_key(key: str, fraction: float) -> bool:
    """Whether a key is among the fraction that is kept; the same on every machine."""
    return stable_hash(key, "key") < fraction


def assign_sources(sources: list[str], rank: int, ranks: int) -> list[Share]:
    """What one of several processes reads: whole sources while they go round, the rest divided by key."""
    whole = len(sources) - len(sources) % ranks
    mine = [Share(source) for source in sources[rank:whole:ranks]]
    return mine + [Share(source, rank, ranks) for source in sources[whole:]]


def count_images(shares: list[Share], wanted: Callable[[str], bool]) -> int | None:
    """How many wanted images some local shares hold, from names alone; None if a source is remote.

    For the progress bar: past 16 tars the rest is estimated from their sizes.
    """
    if any(_is_remote(share.source) for share in shares):
        return None
    folders = [share for share in shares if os.path.isdir(share.source)]
    tars = [share for share in shares if share not in folders]
    total = sum(
        share.holds(key) and wanted(key)
        for share in folders
        for key in (_relative_key(path, share.source) for path in _walk(share.source))
    )
    looked_at = tars[:16]
    found = sum(_count_in_tar(share, wanted) for share in looked_at)
    size = sum(os.path.getsize(share.source) for share in looked_at)
    scale = sum(os.path.getsize(share.source) for share in tars) / size if size else 0.0
    return total + round(found * scale)


def read_images(
    shares: Iterable[Share], wanted: Callable[[str], bool] = lambda key: True, skipped: Skipped = lambda key, why: None
) -> Iterator[Sample]:
    """Decode the wanted images of some sources, one at a time.

    Bad samples are reported through `skipped` and passed over: an image that cannot be decoded, JSON that cannot be
    parsed, a key seen before, an annotation without image, a tar that ends too early.

    Raises:
        InputError: a source that cannot be opened at all.
    """
    seen: set[str] = set()
    for share in shares:
        for raw in _raw_samples(share, wanted, skipped):
            if not raw.keys() & {*IMAGE_SUFFIXES, "json"}:
                continue  # a README or the like
            key = raw["__key__"]
            if key in seen:
                skipped(key, "key seen before")
                continue
            seen.add(key)
            try:
                yield decode_sample(key, raw)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                skipped(key, f"{type(error).__name__}: {error}")


def decode_sample(key: str, raw: dict[str, Any]) -> Sample:
    """Undecoded files of one key, by suffix → `Sample`.

    Raises:
        OSError, ValueError, SyntaxError, DecompressionBombError: whatever is wrong with the image or the JSON.
    """
    encoded = next((raw[suffix] for suffix in IMAGE_SUFFIXES if suffix in raw), None)
    if encoded is None:
        raise ValueError(f"no image beside .{', .'.join(sorted(k for k in raw if not k.startswith('__')))}")
    annotation = usable_annotation(raw["json"]) if "json" in raw else None
    return Sample(key, decode_image(encoded), annotation)


def decode_image(encoded: bytes) -> np.ndarray:
    """Bytes of a jpg, png or webp → RGB uint8 (H, W, 3), turned upright as its EXIF orientation says.

    That is what `cv2.imread` does, which segment-anything's notebooks and scripts read images with: orientation
    applied, alpha dropped, 16 bits cut to the upper 8.

    Raises:
        OSError, ValueError, SyntaxError, DecompressionBombError: not a whole image.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            gray = np.asarray(upright).astype(np.uint32) >> 8
            return np.repeat(gray.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
        return np.asarray(upright.convert("RGB"))


def _raw_samples(share: Share, wanted: Callable[[str], bool], skipped: Skipped) -> Iterator[dict[str, Any]]:
    """Undecoded samples of one share, as WebDataset groups them: `__key__`, and bytes by suffix."""

    def mine(key: str) -> bool:
        return share.holds(key) and wanted(key)

    if os.path.isdir(share.source):
        yield from _folder_samples(share.source, mine)
    else:
        yield from _tar_samples(share.source, mine, skipped)


def _tar_samples(url: str, mine: Callable[[str], bool], skipped: Skipped) -> Iterator[dict[str, Any]]:
    opened = False

    def select(name: str) -> bool:
        nonlocal opened
        opened = True
        return mine(_tar_key(name))

    def handler(error: Exception) -> bool:
        reason = str(error.args[0]) if error.args else repr(error)
        if not opened:
            raise InputError(f"cannot read {url}: {reason}") from error
        skipped(url, reason)
        return True

    yield from wds.tarfile_samples([{"url": url}], handler=handler, select_files=select, rename_files=_without_dot)


def _folder_samples(root: str, mine: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    for path in _walk(root):
        key = _relative_key(path, root)
        if mine(key):
            raw: dict[str, Any] = {"__key__": key, _suffix(path): path.read_bytes()}
            annotation = path.with_suffix(".json")
            if annotation.exists():
                raw["json"] = annotation.read_bytes()
            yield raw


def _count_in_tar(share: Share, wanted: Callable[[str], bool]) -> int:
    keys: set[str] = set()
    try:
        with tarfile.open(share.source) as tar:
            names = (_without_dot(member.name) for member in tar)
            keys.update(_tar_key(name) for name in names if _suffix(Path(name)) in IMAGE_SUFFIXES)
    except (tarfile.TarError, OSError):
        # Only an estimate: reading the images will say what is wrong with this tar, and stop or go on.
        return 0
    return sum(share.holds(key) and wanted(key) for key in keys)


def _expand_local(path: str) -> list[str]:
    if glob.has_magic(path) and not os.path.exists(path):
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise InputError(f"no images: nothing matches {path!r}")
        return matches
    if os.path.isdir(path) and not any(True for _ in _walk(path)):
        tars = sorted(str(tar) for tar in Path(path).rglob("*.tar"))
        if not tars:
            raise InputError(f"no images: neither an image nor a tar below {path!r}")
        return tars
    return [path]


def _walk(root: str) -> Iterator[Path]:
    """Image files below a folder, in an order that does not depend on the file system."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(files) if _suffix(Path(name)) in IMAGE_SUFFIXES)


def _relative_key(path: Path, root: str) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def _suffix(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _is_remote(source: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", source) is not None


def _tar_name(source: str) -> str:
    """`sa_000020.tar` from a path, a URL or a pipe's command line; the whole source where none is named."""
    names = re.findall(r"[^/\s=?&'\"]+\.tar", source)
    return names[-1] if names else source


def _without_dot(name: str) -> str:
    return re.sub(r"^(\./)+", "", name)


def _tar_key(name: str) -> str:
    """WebDataset's key of a member: its path up to the first dot of the file's name."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.')[0]}" if folder else base.split(".")[0]
