"""Small pictures and tars of them, and reading them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from embeddings_cache.images.annotations import encode_rle
from embeddings_cache.images.samples import Sample, read_images
from embeddings_cache.images.sources import Share

ANNOTATION = json.dumps({"annotations": [{"segmentation": encode_rle(np.eye(30, 40, dtype=bool))}]}).encode()
"""SA-1B's JSON with one mask, for a picture of 40×30 px."""


def encoded(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    """A gradient as a file of some kind; `size` is (width, height)."""
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def read(*sources: str) -> tuple[list[Sample], dict[str, str]]:
    """All samples of some sources, and the reason for each thing skipped."""
    skipped: dict[str, str] = {}
    samples = list(read_images([Share(source) for source in sources], skipped=skipped.__setitem__))
    return samples, skipped
