"""Pictures that lie in folders: a tree of them, those that a glob matches, or a single one."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from embeddings_cache.images.names import ANNOTATION, Group, group_by_stem, is_picture, stem_of


def is_pattern(source: str) -> bool:
    """Whether a local source is a glob; a file or folder may have such a name."""
    return glob.has_magic(source) and not os.path.exists(source)


def is_folder_like(source: str) -> bool:
    """Whether a local source's pictures are files of their own."""
    return os.path.isdir(source) or is_pattern(source) or is_picture(source)


def files_of(source: str) -> tuple[Path, list[str]]:
    """A folder, and the names of a source's files in it, in an order that does not depend on the file system.

    Of a folder these are all files; of a glob, and of a single picture, the pictures and their annotations.
    """
    if os.path.isdir(source):
        return Path(source), [path.relative_to(source).as_posix() for path in walk_files(source)]
    pictures = [path for path in top_matches(source) if is_picture(path)] if is_pattern(source) else [source]
    root = Path(source).parent
    while is_pattern(str(root)):
        root = root.parent
    annotations = [f"{stem_of(path)}.{ANNOTATION}" for path in pictures]
    files = [*pictures, *filter(os.path.isfile, dict.fromkeys(annotations))]
    return root, [Path(path).relative_to(root).as_posix() for path in files]


def annotated_pictures(source: str) -> Iterator[tuple[str, Path, Path]]:
    """Key, picture and annotation of those of a source's pictures that have one beside them."""
    root, names = files_of(source)
    for found in group_by_stem(names):
        if isinstance(found, Group) and found.annotation is not None:
            yield found.key, root / names[found.picture], root / names[found.annotation]


def top_matches(pattern: str) -> list[str]:
    """What a glob matches, in order, without what lies in a folder that it matches too."""
    matches = sorted(glob.glob(pattern, recursive=True))
    folders = {os.path.normpath(path) for path in matches if os.path.isdir(path)}
    return [path for path in matches if not folders & {str(parent) for parent in Path(path).parents}]


def walk_files(root: str) -> Iterator[Path]:
    """Files below a folder, links followed once, in an order that does not depend on the file system."""
    visited = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        for name in sorted(files):
            yield Path(folder, name)
