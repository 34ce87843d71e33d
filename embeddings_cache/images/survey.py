"""What some sources hold, from names alone: told before the teacher, or anything else that takes long, begins."""

import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from embeddings_cache.images.archives import first_names, is_stream
from embeddings_cache.images.folders import files_of, is_folder_like
from embeddings_cache.images.formats import WANTING
from embeddings_cache.images.names import (
    ANNOTATION,
    Group,
    LeftOut,
    Lost,
    group_by_stem,
    group_files,
    is_hidden,
    is_picture,
    suffix_of,
    webdataset_key,
)
from embeddings_cache.images.remote import is_remote

LISTED_MEMBERS = 2000
"""Files of a tar whose names are read to count its images; SA-1B's have some 22,000."""
LISTED_ARCHIVES = 16
KINDS_NAMED = 6


@dataclass
class Survey:
    """What names say.

    Attributes:
        archives, places: tars and zips; folders and globs of pictures.
        remote: sources that cannot be looked into before.
        images: those wanted, by suffix; annotated: those of them that have an annotation beside them.
        left_out: files that are no sample's, by kind; lost: those that should be and are not.
        apart: tars that can only be read from front to back and have annotations far from their pictures.
        estimated: not all archives were looked into, or not to their ends.
    """

    archives: int = 0
    places: int = 0
    remote: int = 0
    images: Counter[str] = field(default_factory=Counter)
    annotated: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    apart: list[str] = field(default_factory=list)
    estimated: bool = False

    @property
    def total(self) -> int | None:
        """How many wanted images there are; None where some sources are remote."""
        return None if self.remote else sum(self.images.values())

    def __str__(self) -> str:
        """In one line: images by kind, where, annotations, and what is left out."""
        where = [_counted(self.archives, "tar or zip", "tars or zips"), _counted(self.places, "folder", "folders")]
        where.append(_counted(self.remote, "remote source, not counted", "remote sources, not counted"))
        about = "about " if self.estimated else ""
        images = f"{about}{sum(self.images.values()):,} images ({listed(self.images)})" if self.images else "no images"
        line = f"{images} in {', '.join(filter(None, where))}; {about}{self.annotated:,} with annotations"
        if self.lost:
            line += f"; {about}{self.lost:,} files to be skipped"
        if self.left_out:
            line += f"; left out: {about}{listed(self.left_out, remedies=True)}"
        if self.apart:
            line += f"; in {self.apart[0]} annotations lie apart from their images and cannot be used: unpack it first"
        return line


def look_through(sources: Sequence[str], wanted: Callable[[str], bool], annotated: Container[str] = ()) -> Survey:
    """What local sources hold; large archives, and many of them, are estimated from their beginnings.

    Args:
        sources: archives, folders, globs.
        wanted: whether the image with a key is.
        annotated: keys that have an annotation elsewhere than beside the image.
    """
    survey = Survey(remote=sum(map(is_remote, sources)))
    local = [source for source in sources if not is_remote(source)]
    archives = [source for source in local if not is_folder_like(source)]
    for place in [source for source in local if is_folder_like(source)]:
        survey.places += 1
        _, names = files_of(place)
        _add(survey, group_by_stem(names), names, wanted, annotated)
    survey.archives = len(archives)
    looked_into, bytes_listed = Survey(), 0.0
    chosen = archives[:: max(1, len(archives) // LISTED_ARCHIVES)]
    for archive in chosen:
        names, share = first_names(archive, LISTED_MEMBERS)
        _add(looked_into, group_files(names), names, wanted, annotated)
        bytes_listed += share * os.path.getsize(archive)
        if _lies_apart(names) and is_stream(archive):
            survey.apart.append(archive)
    in_all = sum(map(os.path.getsize, archives))
    survey.estimated = round(bytes_listed) < in_all
    scale = in_all / bytes_listed if bytes_listed else 0.0
    survey.images += _scaled(looked_into.images, scale)
    survey.left_out += _scaled(looked_into.left_out, scale)
    survey.annotated += round(looked_into.annotated * scale)
    survey.lost += round(looked_into.lost * scale)
    return survey


def listed(kinds: Counter[str], remedies: bool = False) -> str:
    """`3 .heic, 2 .txt`, the commonest first; with `remedies` also what would make a kind readable."""
    named = kinds.most_common(KINDS_NAMED)
    parts = [f"{count:,} {kind}" + (_remedy(kind) if remedies else "") for kind, count in named]
    rest = sum(kinds.values()) - sum(count for _, count in named)
    return ", ".join(parts) + (f", {rest:,} others" if rest else "")


def _add(
    survey: Survey,
    found: Iterable[Group | Lost | LeftOut],
    names: list[str],
    wanted: Callable[[str], bool],
    annotated: Container[str],
) -> None:
    for item in found:
        if isinstance(item, LeftOut):
            survey.left_out[item.kind] += 1
        elif isinstance(item, Lost):
            survey.lost += wanted(item.name)
        elif wanted(item.key):
            survey.images["." + suffix_of(names[item.picture])] += 1
            survey.annotated += item.annotation is not None or item.key in annotated


def _lies_apart(names: list[str]) -> bool:
    """Whether there are annotations, and files of one key do not follow each other."""
    annotations = {name for name in names if suffix_of(name) == ANNOTATION and not is_hidden(name)}
    runs = [key for key, _ in groupby((n for n in names if is_picture(n) or n in annotations), key=webdataset_key)]
    return bool(annotations) and len(runs) > len(set(runs))


def _remedy(kind: str) -> str:
    remedy = WANTING.get(kind.removeprefix("."))
    return f" ({remedy})" if remedy else ""


def _scaled(counts: Counter[str], scale: float) -> Counter[str]:
    return Counter({kind: round(count * scale) for kind, count in counts.items()})


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}" if count else ""
