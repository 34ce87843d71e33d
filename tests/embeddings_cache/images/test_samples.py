import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embeddings_cache.images.decoding import decode_image
from embeddings_cache.images.samples import count_images
from embeddings_cache.images.sources import expand_sources
from pictures import ANNOTATION, encoded, read, write_tar


def test_a_folder_tree(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "a.v2.png").write_bytes(encoded("PNG"))
    (tmp_path / "b" / "c.JPG").write_bytes(encoded())
    (tmp_path / "b" / "c.json").write_bytes(ANNOTATION)
    (tmp_path / "b" / "deep" / "d.webp").write_bytes(encoded("WEBP"))
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    samples, skipped = read(*expand_sources(str(tmp_path)))
    assert [(s.key, s.annotation is not None) for s in samples] == [("a.v2", False), ("b/c", True), ("b/deep/d", False)]
    assert skipped == {}


def test_odd_things_in_a_folder_do_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(encoded())
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "good2.jpg").write_bytes(encoded())
    (tmp_path / "good2.json").mkdir()
    (tmp_path / "._good.jpg").write_bytes(b"what macOS adds")
    (tmp_path / "loop").symlink_to(tmp_path)
    bad_name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    Path(os.fsdecode(bad_name)).write_bytes(encoded())
    samples, skipped = read(str(tmp_path))
    assert [sample.key for sample in samples] == ["good", "good2"]
    assert skipped["dangling"] == "FileNotFoundError: No such file or directory"
    assert skipped[os.fsdecode(b"caf\xe9")] == "its name is not printable text"
    assert len(skipped) == 2


def test_count_agrees_with_what_is_read(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {f"./sa_{n}.{s}": encoded() for n in range(9) for s in ("jpg", "json")})
    (tmp_path / "f").mkdir()
    for n in range(4):
        (tmp_path / "f" / f"{n}.jpg").write_bytes(encoded())
    assert count_images([tar, str(tmp_path / "f")], lambda key: key not in ("3", "sa_5")) == 8 + 3
    assert count_images(["pipe:cat x.tar"], lambda key: True) is None


def test_bad_samples_are_skipped_with_a_reason(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "bad.tar",
        [
            ("cut.jpg", encoded(size=(400, 300))[:2000]),
            ("good.jpg", encoded()),
            ("html.jpg", b"<html>404</html>"),
            ("empty.png", b""),
            ("broken.jpg", encoded()),
            ("broken.json", b'{"annotations": ['),
            ("lonely.json", ANNOTATION),
            ("good.jpg", encoded(size=(10, 10))),
        ],
    )
    samples, skipped = read(tar)
    assert [(s.key, s.original_size) for s in samples] == [("good", (30, 40))]
    assert set(skipped) == {"cut", "html", "empty", "broken", "lonely", "good"}
    assert "truncated" in skipped["cut"]
    assert "cannot identify" in skipped["html"]
    assert "JSONDecodeError" in skipped["broken"]
    assert "without image" in skipped["lonely"]
    assert "seen before" in skipped["good"]


@pytest.mark.parametrize(
    ("kind", "mode", "tolerance"),
    [("PNG", "RGB", 0), ("PNG", "RGBA", 0), ("WEBP", "RGBA", 8), ("JPEG", "CMYK", 8), ("PNG", "P", 51)],
)
def test_colour_modes_keep_their_colours(kind: str, mode: str, tolerance: int) -> None:
    expected = np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 98} if kind == "JPEG" else {}
    image = decode_image(encoded(kind, mode, **options))
    assert (image.shape, image.dtype) == ((30, 40, 3), np.uint8)
    assert np.abs(image.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_gray_becomes_three_equal_channels(mode: str) -> None:
    image = decode_image(encoded("PNG", mode))
    assert image.shape == (30, 40, 3)
    assert np.array_equal(image, np.repeat(image[..., :1], 3, axis=2))
    assert image[0, 0, 0] < image[-1, -1, 0]


def test_alpha_is_dropped_not_blended() -> None:
    pixels = np.full((4, 4, 4), (200, 100, 50, 0), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert (decode_image(buffer.getvalue()) == (200, 100, 50)).all()


def test_a_very_wide_image_is_read() -> None:
    assert decode_image(encoded("JPEG", size=(20_000, 64))).shape == (64, 20_000, 3)


def test_sixteen_bits_become_the_upper_eight() -> None:
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    image = decode_image(buffer.getvalue())
    assert np.array_equal(image, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to view
    upright = decode_image(encoded())
    turned = decode_image(encoded(exif=exif.tobytes()))
    assert turned.shape == (40, 30, 3)
    assert np.array_equal(turned, np.rot90(upright, -1))


def test_damaged_exif_costs_one_image_at_most(tmp_path: Path) -> None:
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    resolution = struct.pack("<HHI4s", 0x011A, 2, 4, b"abc")  # a number, written as text
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + orientation + resolution + bytes(4)
    tar = write_tar(tmp_path / "x.tar", {"odd.jpg": encoded(exif=exif), "good.jpg": encoded()})
    samples, skipped = read(tar)
    assert [sample.key for sample in samples][-1] == "good"
    assert len(samples) + len(skipped) == 2


def test_a_single_pixel_is_an_image() -> None:
    assert decode_image(encoded("PNG", size=(1, 1))).shape == (1, 1, 3)
