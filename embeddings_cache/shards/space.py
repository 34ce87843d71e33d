"""Whether a cache will fit on its disk."""

import shutil
from pathlib import Path

import numpy as np

from embeddings_cache.shards.format import CacheIdentity
from students import InputError

PICTURE_BYTES = {"png": 1.6, "jpeg": 0.45}
"""A pixel of the resized picture, at JPEG quality 95 or below; photographs of SA-1B's kind take rather less."""
ANNOTATION_BYTES = 70_000
"""SA-1B's JSON of an image: about 100 masks of 0.7 kB."""
GIB = 2**30


def row_bytes(identity: CacheIdentity) -> int:
    """About what one image takes on disk; the embedding is exact, picture and annotation are upper guesses."""
    channels = identity.embedding_shape[0]
    embedding = int(np.prod(identity.embedding_shape)) * np.dtype(identity.dtype).itemsize
    scales = 4 * channels if identity.dtype == "int8" else 0
    pixels = identity.image_size**2 * 3 // 4
    picture = PICTURE_BYTES["png" if identity.jpeg_quality == "png" else "jpeg"] * pixels
    return round(embedding + scales + picture + ANNOTATION_BYTES * identity.image_size / 1024)


def check_space(directory: Path, images: int | None, identity: CacheIdentity) -> str:
    """Say what `images` more rows need and what is free, in one line; None: nobody knows how many there are.

    Raises:
        InputError: they will not fit.
    """
    free = shutil.disk_usage(directory).free
    if images is None:
        each = row_bytes(identity) / 2**20
        return f"{each:.2g} MiB needed for each image (remote, not counted), {free / GIB:.1f} GiB free at {directory}"
    needed = images * row_bytes(identity)
    line = f"{needed / GIB:.1f} GiB needed for {images} images, {free / GIB:.1f} GiB free at {directory}"
    if needed > free:
        hint = "" if identity.dtype == "int8" else "; cache.dtype=int8 takes half as much"
        raise InputError(f"{line}{hint}")
    return line
