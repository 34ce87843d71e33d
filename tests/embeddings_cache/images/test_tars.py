import gzip
import http.server
import io
import shutil
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from embeddings_cache.images.samples import count_images
from embeddings_cache.images.sources import expand_sources
from pictures import ANNOTATION, encoded, read, write_tar
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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


@pytest.mark.skipif(shutil.which("curl") is None, reason="WebDataset reads http through curl")
def test_http(tmp_path: Path, server: str) -> None:
    write_tar(tmp_path / "sa_0.tar", {"sa_0.jpg": encoded(), "sa_0.json": ANNOTATION})
    (sample,), skipped = read(f"{server}/sa_0.tar")
    assert (sample.key, sample.annotation, skipped) == ("sa_0", ANNOTATION.decode(), {})
    with pytest.raises(InputError, match=r"cannot read .*/missing\.tar"):
        read(f"{server}/missing.tar")


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


def test_files_of_a_sample_that_lie_apart_are_told_of(tmp_path: Path) -> None:
    names = [f"{n}.{suffix}" for suffix in ("jpg", "json") for n in range(3)]
    tar = write_tar(tmp_path / "x.tar", {name: encoded() if "jpg" in name else ANNOTATION for name in names})
    samples, skipped = read(tar)
    assert [sample.annotation for sample in samples] == [None] * 3
    assert all("its image lies elsewhere" in reason for reason in skipped.values())
    assert len(skipped) == 3


def test_dots_in_a_tars_names_are_told_of(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"IMG.2020.01.jpg": encoded()})
    samples, skipped = read(tar)
    assert samples == []
    assert "WebDataset splits names at the first dot" in skipped["IMG"]
    assert count_images([tar], lambda key: True) == 0


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
