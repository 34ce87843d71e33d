"""What the names of files say: which are pictures, and which belong together."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from embeddings_cache.images.formats import picture_suffixes

ANNOTATION = "json"
HIDDEN = "hidden files"
LONGEST_SUFFIX = 8
BESIDE = "pictures beside another of the same name"


@dataclass(frozen=True)
class Group:
    """A picture and what is known of it: places in a list of names."""

    key: str
    picture: int
    annotation: int | None = None


@dataclass(frozen=True)
class Lost:
    """What should have been a sample and is none: its name and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class LeftOut:
    """A file that is no sample's, and what kind of file it is."""

    name: str
    kind: str


def suffix_of(name: str) -> str:
    """`jpg` of `a/b.c.JPG`; "" where there is none."""
    return PurePosixPath(name).suffix.lower().removeprefix(".")


def stem_of(name: str) -> str:
    """`a/b.c` of `a/b.c.JPG`."""
    return name[: len(name) - len(PurePosixPath(name).suffix)]


def is_hidden(name: str) -> bool:
    """Hidden files, the `._name` that macOS adds, and WebDataset's `__meta__` files are no samples."""
    return os.path.basename(name).startswith((".", "__"))


def is_picture(name: str) -> bool:
    """Whether a file is a picture that can be read here, by its name."""
    return not is_hidden(name) and suffix_of(name) in picture_suffixes()


def kind_of(name: str) -> str:
    """What a file is counted as where it is left out."""
    if is_hidden(name):
        return HIDDEN
    suffix = suffix_of(name)
    if not suffix:
        return "files without a suffix"
    known = suffix.isascii() and suffix.isalnum() and not suffix.isdigit() and len(suffix) <= LONGEST_SUFFIX
    return f".{suffix}" if known else "other files"


def webdataset_key(name: str) -> str:
    """A member's path up to the first dot of the file's name."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def group_files(names: Sequence[str]) -> Iterator[Group | Lost | LeftOut]:
    """What the files of an archive are, wherever they lie in it; each name is in one answer.

    WebDataset takes what stands before a name's first dot for the sample's key, and what follows for the kind of file:
    `0002.webp` is a picture, `0002.seg.png` something that belongs to it. Where nothing is called so, a name with dots
    is a name like any other, as cameras give them: `IMG_2024.01.05.jpg` has the key `IMG_2024.01.05`.

    Args:
        names: of files, in order.

    Yields:
        Groups in the order of their pictures within a key; a second picture of one name is a group of its own, with
        the same key.
    """
    together: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if is_hidden(name):
            yield LeftOut(name, HIDDEN)
        else:
            together.setdefault(webdataset_key(name), []).append(place)
    for key, places in together.items():
        yield from _group(key, places, names)


def group_by_stem(names: Sequence[str]) -> Iterator[Group | Lost | LeftOut]:
    """What the files of a folder are: there, a picture's annotation has its name with another suffix."""
    annotations = {stem_of(name): place for place, name in enumerate(names) if suffix_of(name) == ANNOTATION}
    order = {suffix: place for place, suffix in enumerate(picture_suffixes())}
    best: dict[str, int] = {}
    for name in filter(is_picture, names):
        kind = order[suffix_of(name)]
        best[stem_of(name)] = min(kind, best.get(stem_of(name), kind))
    for place, name in enumerate(names):
        stem = stem_of(name)
        if is_picture(name) and order[suffix_of(name)] == best[stem]:
            yield Group(stem, place, annotations.get(stem))
        elif is_picture(name):
            yield LeftOut(name, BESIDE)
        elif annotations.get(stem) != place or stem not in best:
            yield LeftOut(name, kind_of(name))


def _group(key: str, places: list[int], names: Sequence[str]) -> Iterator[Group | Lost | LeftOut]:
    """The files of one WebDataset key."""
    pictures = [place for place in places if is_picture(names[place])]
    annotations: dict[str, int] = {}
    for place in places:
        if suffix_of(names[place]) == ANNOTATION:
            annotations.setdefault(stem_of(names[place]), place)
    plain = [place for place in pictures if stem_of(names[place]) == key]
    stems = list(dict.fromkeys(stem_of(names[place]) for place in pictures))
    used: set[int | None] = set()
    if plain:
        order = picture_suffixes()
        kind = min((suffix_of(names[place]) for place in plain), key=order.index)
        stems = [key]
        for place in pictures:
            if place not in plain or suffix_of(names[place]) != kind:
                yield LeftOut(names[place], BESIDE)
        pictures = [place for place in plain if suffix_of(names[place]) == kind]
    elif len(stems) > 1 and all(stem[len(key) + 1 :].isalpha() for stem in stems):
        choice = " or ".join(os.path.basename(names[place]) for place in pictures[:2])
        for place in pictures:
            yield Lost(names[place], f"its name is ambiguous: which is the picture of {key}, {choice}?")
        pictures = []
    for number, place in enumerate(pictures):
        stem = stem_of(names[place])
        annotation = annotations.get(stem, annotations.get(key) if len(stems) == 1 else None)
        again = any(stem_of(names[earlier]) == stem for earlier in pictures[:number])
        used.add(annotation)
        yield Group(stem, place, None if again else annotation)
    for place in places:
        name = names[place]
        if place in used or is_picture(name):
            continue
        if stems or suffix_of(name) != ANNOTATION:
            yield LeftOut(name, kind_of(name))
        else:
            yield Lost(stem_of(name), "annotation without image")
