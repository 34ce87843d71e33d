"""Images in: SA-1B tars as published, any other WebDataset tar, zips, any folder tree of pictures."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from embeddings_cache.images.annotations import usable_annotation
from embeddings_cache.images.archives import Member, is_stream, open_members, read_stream
from embeddings_cache.images.decoding import AS_OPENCV, Reading, decode_picture, reason_of
from embeddings_cache.images.folders import files_of, is_folder_like
from embeddings_cache.images.names import Group, LeftOut, Lost, group_by_stem, group_files, suffix_of
from embeddings_cache.images.polygons import CocoFile
from embeddings_cache.images.remote import is_remote
from embeddings_cache.images.skipped import Skipped
from embeddings_cache.images.sources import Share
from embeddings_cache.system import PASSING, Workers
from students import InputError

GOES_ON = "; the same command goes on from here"
APART = "its image lies elsewhere in the tar, they must lie together"


Bad = tuple[str, str]
"""Key of a sample, and why it cannot be had."""


class Noted(Protocol):
    """What has become of an image: `notes` say what there is to know of the one that `key` names."""

    @property
    def key(self) -> str: ...

    @property
    def notes(self) -> tuple[str, ...]: ...


N = TypeVar("N", bound=Noted)


@dataclass(frozen=True)
class Sample:
    """One image as it came: `key` names it, `picture` is RGB and upright, `annotation` SA-1B's JSON if it has one.

    `kind` is the picture's suffix; `notes` say what there is to know of it, such as why its annotation was not used.
    """

    key: str
    picture: Image.Image
    annotation: str | None
    kind: str = ""
    notes: tuple[str, ...] = ()

    @property
    def image(self) -> np.ndarray:
        """RGB uint8 (H, W, 3)."""
        return np.asarray(self.picture)

    @property
    def original_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.picture.height, self.picture.width


@dataclass(frozen=True)
class Encoded:
    """A sample's files: the picture's bytes, and its annotation's; `kind` is the picture's suffix."""

    key: str
    kind: str
    picture: bytes
    annotation: bytes | None


@dataclass(frozen=True)
class Decoder:
    """What makes a sample of its files.

    Args:
        reading: how pictures are decoded.
        annotations: of images that have no usable one beside them.
    """

    reading: Reading = AS_OPENCV
    annotations: CocoFile | None = None

    def __call__(self, encoded: Encoded) -> Sample | Bad:
        """The sample, or its key and why it cannot be had."""
        notes: list[str] = []
        try:
            picture = decode_picture(encoded.picture, self.reading, notes.append)
        except Exception as error:  # Pillow lets many kinds through; one bad sample must not end the run
            return encoded.key, reason_of(error)
        size = (picture.height, picture.width)
        annotation, beside = None, list[str]()
        if encoded.annotation is not None:
            annotation = usable_annotation(encoded.annotation, size, beside.append)
        if annotation is None and self.annotations is not None and (listed := self.annotations.annotation(encoded.key)):
            annotation, beside = usable_annotation(listed, size, notes.append), []
        return Sample(encoded.key, picture, annotation, encoded.kind, (*notes, *beside))


@dataclass(frozen=True)
class Files:
    """Files by name, how they are grouped into samples, and reading one by its place."""

    names: list[str]
    group: Callable[[list[str]], Iterator[Group | Lost | LeftOut]]
    read: Callable[[int], bytes]


@dataclass
class Account:
    """What became of everything in some sources that is no sample of theirs.

    Attributes:
        skipped: is called with the key (or the source) and the reason for every bad sample.
        noted: is called with the key of an image that is used, and what there is to know of it.
        divided: number of wanted keys in each source that several processes divide: they must have found the same, or
            some image is read twice or not at all.
        left_out: by source, how many files of each kind were no sample's.
    """

    skipped: Skipped = lambda key, why: None
    noted: Skipped = lambda key, what: None
    divided: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)


def read_images(
    shares: Iterable[Share],
    wanted: Callable[[str], bool] = lambda key: True,
    account: Account | None = None,
    decoder: Decoder | None = None,
    threads: int = 1,
) -> Iterator[Sample]:
    """Decode the wanted images of some sources, in order, in threads; what else can be said is at `read_with`."""
    with Workers(decoder or Decoder(), threads=threads) as workers:
        yield from read_with(workers, shares, wanted, account)


def read_with(
    workers: Workers[Encoded, N | Bad],
    shares: Iterable[Share],
    wanted: Callable[[str], bool] = lambda key: True,
    account: Account | None = None,
) -> Iterator[N]:
    """What some workers make of the wanted images of some sources, in order.

    Bad samples are reported and passed over: an image that cannot be decoded, a key seen before, an annotation without
    image, a local tar that ends too early.

    Args:
        workers: call a `Decoder`, and what they will with its sample.
        shares: from `assign_sources`.
        wanted: whether the image with a key is.
        account: is told of all that does not become a sample, and of notes.

    Raises:
        InputError: a source that cannot be opened at all, or a download that breaks off.
    """
    account = account or Account()
    with closing(workers.map(_unique_samples(shares, wanted, account))) as made:
        for item in made:
            if isinstance(item, tuple):
                account.skipped(*item)
            else:
                for note in item.notes:
                    account.noted(item.key, note)
                yield item


def _unique_samples(shares: Iterable[Share], wanted: Callable[[str], bool], account: Account) -> Iterator[Encoded]:
    seen: set[str] = set()

    for share in shares:
        positions: dict[str, int] = {}  # of wanted names: the same in every process that reads this source

        def mine(name: str, positions: dict[str, int] = positions, share: Share = share) -> bool:
            return wanted(name) and positions.setdefault(name, len(positions)) % share.parts == share.part

        left_out = account.left_out[share.source] = Counter()
        for files in _windows(share.source, account.skipped):
            for found in files.group(files.names):
                if isinstance(found, LeftOut):
                    left_out[found.kind] += 1
                elif isinstance(found, Lost):
                    if mine(found.name):
                        account.skipped(found.name, found.reason + (f"; {APART}" if found.name in seen else ""))
                elif mine(found.key) and (sample := _encoded(found, files, seen, account)):
                    yield sample
        if share.parts > 1:
            account.divided[share.source] = len(positions)


def _encoded(group: Group, files: Files, seen: set[str], account: Account) -> Encoded | None:
    """The bytes of a sample, unless it is none."""
    key = group.key
    if not key.isprintable():
        account.skipped(key, "its name is not printable text")
    elif key in seen:
        account.skipped(key, "key seen before")
    else:
        try:
            picture = files.read(group.picture)
            annotation = None if group.annotation is None else files.read(group.annotation)
        except OSError as error:
            if error.errno in PASSING:
                raise InputError(f"cannot read {files.names[group.picture]}: {error.strerror}{GOES_ON}") from error
            account.skipped(key, f"{type(error).__name__}: {error.strerror or error}")
            return None
        seen.add(key)
        return Encoded(key, suffix_of(files.names[group.picture]), picture, annotation)
    return None


def _windows(source: str, skipped: Skipped) -> Iterator[Files]:
    """What a source holds: all of it, or, of one that is read from front to back, what may belong together."""
    damaged = partial(skipped, source)
    if not is_remote(source) and is_folder_like(source):
        root, names = files_of(source)
        yield Files(names, group_by_stem, lambda place: (root / names[place]).read_bytes())
    elif is_stream(source):
        yield from map(_of_archive, read_stream(source, damaged))
    else:
        with open_members(source, damaged) as members:
            yield _of_archive(members)


def _of_archive(members: list[Member]) -> Files:
    return Files([name for name, _ in members], group_files, lambda place: members[place][1]())
