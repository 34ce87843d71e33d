import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embeddings_cache.images import formats
from embeddings_cache.images.decoding import decode_image
from embeddings_cache.images.samples import Account, read_images
from embeddings_cache.images.sources import Share, expand_sources
from embeddings_cache.images.survey import look_through
from pictures import ANNOTATION, encoded, left_out, read, write_tar


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
    survey = look_through([tar, str(tmp_path / "f")], lambda key: key not in ("3", "sa_5"))
    assert (survey.total, survey.annotated) == (8 + 3, 8)
    assert look_through(["pipe:cat x.tar"], lambda key: True).total is None


def test_an_annotation_that_cannot_be_used_leaves_the_photograph(tmp_path: Path) -> None:
    files = {"a.jpg": encoded(), "a.json": b'{"annotations": [', "b.jpg": encoded(), "b.json": b""}
    noted: dict[str, str] = {}
    shares = [Share(write_tar(tmp_path / "x.tar", files))]
    samples = list(read_images(shares, account=Account(pytest.fail, noted.__setitem__)))
    assert [(sample.key, sample.annotation) for sample in samples] == [("a", None), ("b", None)]
    assert noted == {
        "a": "annotation not used: not JSON: Expecting value",
        "b": "annotation not used: it is empty",
    }


def test_everything_pillow_reads_is_read_and_the_rest_is_counted(tmp_path: Path) -> None:
    kinds = {"jpg": "JPEG", "tif": "TIFF", "bmp": "BMP", "gif": "GIF", "jfif": "JPEG", "ppm": "PPM", "jp2": "JPEG2000"}
    files = {f"{suffix}.{suffix}": encoded(kind) for suffix, kind in kinds.items()}
    files |= {"movie.mp4": b"", "raw.cr2": b"", "raw2.CR2": b"", "NOTES": b"", ".DS_Store": b"", "alone.json": b"{}"}
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    tar = write_tar(tmp_path / "x.tar", files)
    for source, alone in ((str(folder), {".json": 1}), (tar, {})):
        samples, skipped = read(source)
        assert sorted(sample.key for sample in samples) == sorted(kinds)
        counted = {".cr2": 2, ".mp4": 1, "files without a suffix": 1, "hidden files": 1, **alone}
        assert left_out(source) == counted
        assert len(samples) + len(skipped) + sum(counted.values()) == len(files)
    assert "2 .cr2" in str(look_through([str(folder)], lambda key: True))


def test_of_pictures_of_one_name_the_common_kind_counts(tmp_path: Path) -> None:
    files = {"a.gif": encoded("GIF"), "a.jpg": encoded(), "a.bmp": encoded("BMP"), "a.json": ANNOTATION}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    tar = write_tar(tmp_path.parent / "x.tar", files)
    for source in (str(tmp_path), tar):
        (sample,), skipped = read(source)
        assert (sample.kind, sample.annotation, skipped) == ("jpg", ANNOTATION.decode(), {})
        assert left_out(source) == {"pictures beside another of the same name": 2}


def test_odd_names_are_of_no_kind_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded())
    for name in (b"Fotos vom 3. M\xe4rz", b"frame.000001", b"frame.000002", b"x.with a long end"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"")
    assert left_out(str(tmp_path)) == {"other files": 4}


def test_what_is_not_readable_here_says_what_would_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded())
    (tmp_path / "b.heic").write_bytes(b"")
    known = (formats.picture_formats, formats.picture_suffixes, formats.format_names)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(Image, "EXTENSION", {k: v for k, v in Image.registered_extensions().items() if k != ".heic"})
    for function in known:
        function.cache_clear()
    line = str(look_through([str(tmp_path)], lambda key: True))
    for function in known:
        function.cache_clear()
    assert line == "1 images (1 .jpg) in 1 folder; 0 with annotations; left out: 1 .heic (pip install pillow-heif)"


@pytest.mark.parametrize("suffix", ["heic", "avif"])
def test_what_telephones_write(suffix: str, tmp_path: Path) -> None:
    """By pillow-heif, which also turns it, and by Pillow."""
    picture = Image.fromarray(decode_image(encoded(size=(64, 48))))
    assert suffix in formats.picture_suffixes()
    picture.save(tmp_path / f"a.{suffix}", quality=90)
    (sample,), skipped = read(str(tmp_path))
    assert (sample.key, sample.original_size, skipped) == ("a", (48, 64), {})
    assert np.abs(sample.image.astype(int) - np.asarray(picture)).mean() < 6


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
    assert [(s.key, s.original_size) for s in samples] == [("good", (30, 40)), ("broken", (30, 40))]
    assert set(skipped) == {"cut", "html", "empty", "lonely", "good"}
    assert "truncated" in skipped["cut"]
    assert "cannot identify" in skipped["html"]
    assert "without image" in skipped["lonely"]
    assert "seen before" in skipped["good"]
