"""Small pictures and tars of them, and reading them."""

import io
import json
import struct
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from embeddings_cache.images.rle import encode_rle
from embeddings_cache.images.samples import Account, Sample, read_images
from embeddings_cache.images.sources import Share

ANNOTATION = json.dumps({"annotations": [{"segmentation": encode_rle(np.eye(30, 40, dtype=bool))}]}).encode()
"""SA-1B's JSON with one mask, for a picture of 40×30 px."""


def encoded(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    """A gradient as a file of some kind; `size` is (width, height)."""
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def odd_files() -> list[tuple[str, bytes, str]]:
    """Everything odd that people's tars hold: name, content, and what must become of it.

    That is `row`, a picture that is used; `used`, its annotation; `noted`, an annotation that is not; `left out`; or a
    part of the reason for which it is skipped.
    """
    exif = Image.Exif()
    exif[0x0112] = 6
    unwritable = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    unwritable += struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0") + bytes(4)
    labelme = {"shapes": [{"points": [[5, 5], [30, 5], [30, 25]]}], "imageHeight": 30, "imageWidth": 40}
    bad_rle = {"annotations": [{"segmentation": {"size": [30, 40], "counts": "02"}}]}
    return [
        ("./dotted.jpg", encoded(size=(60, 40)), "row"),
        ("gray.png", encoded("PNG", "L"), "row"),
        ("cmyk.jpg", encoded("JPEG", "CMYK"), "row"),
        ("alpha.png", encoded("PNG", "RGBA"), "row"),
        ("deep.png", encoded("PNG", "I;16"), "row"),
        ("turned.jpg", encoded(exif=exif.tobytes()), "row"),
        ("unwritable.jpg", encoded(exif=unwritable), "row"),
        ("dot.png", encoded("PNG", size=(1, 1)), "row"),
        ("wide.jpg", encoded(size=(20_000, 200)), "row"),
        ("alone.jpg", encoded(), "row"),
        ("both.jpg", encoded(), "row"),
        ("cam1.00000.jpg", encoded(), "row"),
        ("cam1.00001.jpg", encoded(), "row"),
        ("IMG_2024.01.05.JPG", encoded(), "row"),
        ("scan.tif", encoded("TIFF"), "row"),
        ("old.bmp", encoded("BMP"), "row"),
        ("moving.gif", encoded("GIF"), "row"),
        ("saved.jfif", encoded(), "row"),
        ("drawn.jpg", encoded(), "row"),
        ("drawn.json", json.dumps(labelme).encode(), "used"),
        ("marked.jpg", encoded(), "row"),
        ("marked.json", "\N{BYTE ORDER MARK}".encode() + ANNOTATION, "used"),
        ("latin.jpg", encoded(), "row"),
        ("latin.json", '{"caption": "Grüße"}'.encode("latin-1"), "noted"),
        ("empty.jpg", encoded(), "row"),
        ("empty.json", b"", "noted"),
        ("lines.jpg", encoded(), "row"),
        ("lines.json", b"{}\n{}\n", "noted"),
        ("noise.jpg", encoded(), "row"),
        ("noise.json", json.dumps(bad_rle).encode(), "noted"),
        ("map.jpg", encoded(), "row"),
        ("map.seg.png", encoded("PNG", "L"), "left out"),
        ("photo.heif.txt", b"", "left out"),
        ("movie.mp4", b"", "left out"),
        ("._alone.jpg", b"what macOS adds", "left out"),
        ("two.img.png", encoded("PNG"), "ambiguous"),
        ("two.mask.png", encoded("PNG"), "ambiguous"),
        ("truncated.jpg", encoded(size=(400, 300))[:2000], "truncated"),
        ("thin.jpg", encoded(size=(20_000, 10)), "too elongated"),
        ("lonely.json", ANNOTATION, "without image"),
        ("gray.png", encoded("PNG", "L"), "seen before"),
        ("both.json", ANNOTATION, "used"),  # far from its picture
    ]


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_zip(path: Path, members: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return str(path)


def read(*sources: str) -> tuple[list[Sample], dict[str, str]]:
    """All samples of some sources, and the reason for each thing skipped."""
    skipped: dict[str, str] = {}
    samples = list(read_images([Share(source) for source in sources], account=Account(skipped.__setitem__)))
    return samples, skipped


def left_out(*sources: str) -> dict[str, int]:
    """How many files of each kind are no sample's."""
    account = Account()
    list(read_images([Share(source) for source in sources], account=account))
    return dict(sum(account.left_out.values(), Counter()))
