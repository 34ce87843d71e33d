"""The embeddings cache on disk, version 1: what a shard holds and what identifies a cache.

DIR/cache.json               identity, counts, software versions; `complete` once every image is in
DIR/shard-RRRRR-NNNNN.h5     writer rank, sequence number; written under a temporary name, then immutable
DIR/skipped.jsonl            key and reason of every sample that was passed over
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from embeddings_cache.system import installed_versions, read_json
from students import InputError

FORMAT = "sam-distill embeddings cache"
VERSION = 1
DTYPES = ("float16", "int8")

RECIPE_KEYS = {
    "teacher_name": "teacher.name",
    "teacher_sha256": "SHA-256 of the teacher's weights",
    "teacher_dtype": "teacher.dtype",
    "dtype": "cache.dtype",
    "jpeg_quality": "cache.jpeg_quality",
    "preprocess": "fingerprint of the preprocessing",
    "data_images": "data.images",
    "data_fraction": "data.fraction",
    "data_annotations": "data.annotations",
}
"""What a field of `CacheIdentity` is called where a person reads of it."""

UTF8 = h5py.string_dtype("utf-8")
BYTES = h5py.vlen_dtype(np.uint8)


@dataclass(frozen=True)
class CacheIdentity:
    """What decides a cache's content; a cache and a recipe that differ here do not go together."""

    teacher_name: str
    teacher_sha256: str
    teacher_dtype: str
    image_size: int
    embedding_shape: tuple[int, int, int]
    dtype: str
    jpeg_quality: int | str
    preprocess: str
    data_images: str
    data_fraction: float
    data_annotations: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain data; a setting that came later is left out where it is what there was before, so that results which
        note what they were made from stay current."""
        return {name: value for name, value in asdict(self).items() if name != "data_annotations" or value}

    def differences(self, other: "CacheIdentity") -> list[str]:
        """`key: mine, not theirs` for all that differs, in the recipe's words."""
        mine, theirs = vars(self), vars(other)
        return [
            f"{RECIPE_KEYS.get(name, name)}: {mine[name]!r}, not {theirs[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        ]


@dataclass(frozen=True)
class CacheInfo:
    """The content of `cache.json`.

    `noted` counts rows that there is something to know of, `left_out` the files that were no sample's, by kind.
    """

    identity: CacheIdentity
    complete: bool
    images: int = 0
    skipped: int = 0
    shards: int = 0
    noted: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain data, with the format's name and the versions of the software that wrote it."""
        return {"format": FORMAT, "version": VERSION, **asdict(self), "software": software_versions()}


def images_name(images: str | list[str]) -> str:
    """What a recipe's `data.images` is called in a cache: itself, or a digest of a list."""
    if isinstance(images, str):
        return images
    return f"{len(images)} sources, SHA-256 {hashlib.sha256(json.dumps(images).encode()).hexdigest()[:16]}"


def identity_of(values: Mapping[str, Any]) -> CacheIdentity:
    """An identity from `cache.json` or from a shard's attributes.

    Raises:
        KeyError: a field is missing.
    """
    # What they were before they could be chosen.
    values = {"teacher_dtype": "float32", "data_annotations": "", **values}
    plain = {entry.name: values[entry.name] for entry in fields(CacheIdentity)}
    plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in plain.items()}
    return CacheIdentity(**{**plain, "embedding_shape": tuple(plain["embedding_shape"])})


def read_info(directory: Path) -> CacheInfo | None:
    """What `cache.json` says; None where there is none.

    Raises:
        InputError: it is not a cache of ours, or of a version that this code does not read.
    """
    path = directory / "cache.json"
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} does not describe an embeddings cache")
    if content.get("version") != VERSION:
        raise InputError(f"{path} is of version {content.get('version')}; this code reads version {VERSION}")
    try:
        counts = {name: content[name] for name in ("complete", "images", "skipped", "shards")}
        later = {name: content[name] for name in ("noted", "left_out") if name in content}
        return CacheInfo(identity_of(content["identity"]), **counts, **later)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r}") from error


def refuse_other_cache(directory: Path, found: CacheIdentity, expected: CacheIdentity) -> None:
    """Raise `InputError`, naming what differs, unless the cache found is the one expected."""
    if differences := found.differences(expected):
        raise InputError(f"the cache at {directory} is another one: {'; '.join(differences)}. Choose another cache.dir")


def software_versions() -> dict[str, str]:
    """Versions of the packages whose code shapes an embedding or a file."""
    return installed_versions(("sam-distill", "torch", "torchvision", "segment-anything-py", "pillow", "h5py", "numpy"))
