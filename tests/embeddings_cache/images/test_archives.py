import errno
import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embeddings_cache.images import archives
from embeddings_cache.images.rle import encode_rle
from embeddings_cache.images.sources import expand_sources
from embeddings_cache.images.survey import look_through
from pictures import ANNOTATION, encoded, left_out, read, write_tar, write_zip
from students import InputError


def test_names_with_and_without_dot_slash_are_the_same(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "a.tar", {"sa_1.jpg": encoded(), "sa_1.json": ANNOTATION})
    dotted = write_tar(tmp_path / "b.tar", {"./sa_1.jpg": encoded(), "./sa_1.json": ANNOTATION})
    (first,), (second,) = read(plain)[0], read(dotted)[0]
    assert first.key == second.key == "sa_1"
    assert first.annotation == second.annotation == ANNOTATION.decode()
    assert np.array_equal(first.image, second.image)


def test_a_pipe_and_a_pipe_with_braces(tmp_path: Path) -> None:
    write_tar(tmp_path / "sa_0.tar", {"sa_0.jpg": encoded()})
    write_tar(tmp_path / "sa_1.tar", {"sa_1.jpg": encoded()})
    sources = expand_sources(f"pipe:cat {tmp_path}/sa_{{0..1}}.tar")
    assert sources == [f"pipe:cat {tmp_path}/sa_{n}.tar" for n in (0, 1)]
    assert [sample.key for sample in read(*sources)[0]] == ["sa_0", "sa_1"]


def damage(data: bytes, kind: str) -> bytes:
    """A tar of four members, harmed behind the second one; `tarfile` itself is silent about most of these."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        third = tar.getmembers()[2].offset
    return {
        "within a member": data[: third + 700],
        "between members": data[:third],
        "within a header": data[: third + 100],
        "header overwritten": data[:third] + b"x" * 512 + data[third + 512 :],
        "zeroed": data[:third] + bytes(2048) + data[third + 2048 :],
        "no end mark": data[:third] + data[third:].rstrip(b"\0"),
    }[kind]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "kind", ["within a member", "between members", "within a header", "header overwritten", "zeroed", "no end mark"]
)
def test_a_damaged_tar_gives_what_is_whole_and_says_so(kind: str, compressed: bool, tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "a.tar", {f"sa_{n}.jpg": encoded(size=(400, 300)) for n in range(4)}))
    data = damage(path.read_bytes(), kind)
    path.write_bytes(gzip.compress(data) if compressed else data)
    samples, skipped = read(str(path))
    assert [sample.key for sample in samples][:2] == ["sa_0", "sa_1"]
    assert len(samples) == (4 if kind == "no end mark" else 2)
    assert list(skipped) == [str(path)]
    assert "cut short or damaged" in skipped[str(path)]
    with pytest.raises(InputError, match="cannot read pipe:cat"):  # what comes from afar can be asked for again
        read(f"pipe:cat {path}")


def test_a_download_that_breaks_off_stops_the_run(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"sa_{n}.jpg": encoded() for n in range(4)})
    with pytest.raises(InputError, match="cannot read pipe:"):
        read(f"pipe:cat {path}; exit 3")


def test_what_is_no_tar_at_all_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>gone since January 2026</html>" * 100)
    with pytest.raises(InputError, match=r"cannot read .*a\.tar"):
        read(str(tmp_path / "a.tar"))


SMALL = json.dumps({"annotations": [{"segmentation": encode_rle(np.eye(8, dtype=bool))}]}).encode()
"""For a picture of 8×8 px."""
REPACKED = {
    f"{n}.{suffix}": encoded() if suffix == "jpg" else ANNOTATION for suffix in ("jpg", "json") for n in range(3)
}
"""What `tar cf x.tar *.jpg *.json` packs: all pictures, then all annotations."""


@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_a_repacked_archive_keeps_its_annotations(write: Callable[..., str], tmp_path: Path) -> None:
    archive = write(tmp_path / ("x.zip" if write is write_zip else "x.tar"), REPACKED)
    samples, skipped = read(archive)
    assert [sample.annotation for sample in samples] == [ANNOTATION.decode()] * 3
    assert skipped == {}


def test_what_can_only_be_read_from_front_to_back_says_what_lies_apart(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "x.tar", REPACKED))
    path.write_bytes(gzip.compress(path.read_bytes()))
    samples, skipped = read(str(path))
    assert [sample.annotation for sample in samples] == [None] * 3
    assert all("its image lies elsewhere" in reason for reason in skipped.values())
    assert len(skipped) == 3
    assert f"in {path} annotations lie apart from their images" in str(look_through([str(path)], lambda key: True))


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz", "x.zip"])
def test_names_with_dots_are_names(name: str, tmp_path: Path) -> None:
    """As cameras give them: WebDataset would take what follows the first dot for the kind of file."""
    names = [f"cam1.{n:05d}.jpg" for n in range(100)] + ["IMG_2024.01.05.jpg", "a/b.c/plain.jpg"]
    files = {}
    for name_of_picture in names:
        files[name_of_picture] = encoded(size=(8, 8))
        files[name_of_picture.replace(".jpg", ".json")] = SMALL
    path = Path(write_zip(tmp_path / name, files) if name.endswith("zip") else write_tar(tmp_path / name, files))
    if "gz" in name:
        path.write_bytes(gzip.compress(path.read_bytes()))
    samples, skipped = read(str(path))
    assert sorted(sample.key for sample in samples) == sorted(name.removesuffix(".jpg") for name in names)
    assert all(sample.annotation == SMALL.decode() for sample in samples)
    assert skipped == {}
    assert look_through([str(path)], lambda key: True).images == {".jpg": len(names)}


def test_names_that_may_mean_two_things_are_counted_one_by_one(tmp_path: Path) -> None:
    pictures = ["0001.img.png", "0001.seg.png", "0002.img.png", "0002.seg.png"]
    tar = write_tar(tmp_path / "x.tar", dict.fromkeys(pictures, encoded("PNG")) | {"0001.json": ANNOTATION})
    samples, skipped = read(tar)
    assert samples == []
    assert sorted(skipped) == pictures
    assert "which is the picture of 0001, 0001.img.png or 0001.seg.png?" in skipped["0001.seg.png"]
    assert left_out(tar) == {".json": 1}


def test_an_only_picture_with_a_word_in_its_name_has_the_keys_annotation(tmp_path: Path) -> None:
    (sample,), skipped = read(write_tar(tmp_path / "x.tar", {"0001.img.png": encoded("PNG"), "0001.json": ANNOTATION}))
    assert (sample.key, sample.annotation, skipped) == ("0001.img", ANNOTATION.decode(), {})


@pytest.mark.parametrize("compressed", [False, True])
def test_what_macos_puts_between_changes_nothing(compressed: bool, tmp_path: Path) -> None:
    names = [f"{hidden}{n}.{suffix}" for n in range(3) for suffix in ("jpg", "json") for hidden in ("._", "")]
    path = Path(write_tar(tmp_path / "x.tar", {n: encoded() if n.endswith("jpg") else ANNOTATION for n in names}))
    if compressed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    samples, skipped = read(str(path))
    assert [(sample.key, sample.annotation is not None) for sample in samples] == [(str(n), True) for n in range(3)]
    assert (skipped, left_out(str(path))) == ({}, {"hidden files": 6})
    survey = look_through([str(path)], lambda key: True)
    assert (survey.apart, survey.annotated) == ([], 3)


def test_a_stream_of_pictures_alone_has_nothing_apart(tmp_path: Path) -> None:
    files = {f"{n}.{suffix}": encoded() for suffix in ("jpg", "txt") for n in range(3)}
    path = Path(write_tar(tmp_path / "x.tar", files))
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert look_through([str(path)], lambda key: True).apart == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_trouble_that_passes_does_not_cost_a_tars_rest(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = write_tar(tmp_path / "x.tar", {f"{n}.jpg": encoded() for n in range(3)})

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(archives, "_refuse_more", fail)
    with pytest.raises(InputError, match=rf"cannot read .*x\.tar: {os.strerror(number)}; the same command goes on"):
        read(tar)


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path: Path) -> None:
    inner = Path(write_zip(tmp_path / "inner.zip", {"b.jpg": encoded()})).read_bytes()
    tar = write_tar(tmp_path / "x.tar", {"a.jpg": encoded(), "inner.zip": inner})
    assert zipfile.is_zipfile(tar)
    assert [sample.key for sample in read(tar)[0]] == ["a"]
    assert left_out(tar) == {".zip": 1}
    assert look_through([tar], lambda key: True).total == 1


def test_a_zip_with_damage_or_a_password_costs_single_images(tmp_path: Path) -> None:
    path = Path(write_zip(tmp_path / "x.zip", {f"{n}.jpg": encoded() for n in range(3)}))
    with zipfile.ZipFile(path) as archive:
        first = archive.infolist()[0].header_offset
    data = bytearray(path.read_bytes())
    data[first + 200] ^= 255
    path.write_bytes(data)
    samples, skipped = read(str(path))
    assert [sample.key for sample in samples] == ["1", "2"]
    assert "damaged in the zip" in skipped["0"]


def test_any_webdataset_tar_will_do(tmp_path: Path) -> None:
    """Other image types, captions in place of annotations, members of other kinds, pictures that are not the image."""
    tar = write_tar(
        tmp_path / "x.tar",
        {
            "train/0001.png": encoded("PNG"),
            "train/0001.json": b'{"caption": "a dog"}',
            "train/0001.txt": b"a dog",
            "train/0002.seg.png": encoded("PNG", size=(8, 8)),
            "train/0002.webp": encoded("WEBP"),
            "README.md": b"hello",
        },
    )
    samples, skipped = read(tar)
    assert [(s.key, s.original_size, s.annotation) for s in samples] == [
        ("train/0001", (30, 40), None),
        ("train/0002", (30, 40), None),
    ]
    assert skipped == {}
    assert left_out(tar) == {".txt": 1, ".md": 1, "pictures beside another of the same name": 1}
