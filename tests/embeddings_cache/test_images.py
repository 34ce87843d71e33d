import gzip
import http.server
import io
import json
import os
import shutil
import struct
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embeddings_cache.annotations import encode_rle
from embeddings_cache.images import count_images, decode_image, read_images
from embeddings_cache.sources import Share, assign_sources, expand_sources, keep_key, pick_sources
from students import InputError

ANNOTATION = json.dumps({"annotations": [{"segmentation": encode_rle(np.eye(30, 40, dtype=bool))}]}).encode()


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


def read(*sources: str) -> tuple[list, dict[str, str]]:
    skipped: dict[str, str] = {}
    samples = list(read_images([Share(source) for source in sources], skipped=skipped.__setitem__))
    return samples, skipped


# --- where images come from ---------------------------------------------------------------------------------------


def test_brace_patterns_globs_and_lists(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"sa_{number:06d}.tar", {f"sa_{number}.jpg": encoded()})
    tars = [str(tmp_path / f"sa_{number:06d}.tar") for number in range(3)]
    assert expand_sources(f"{tmp_path}/sa_{{000000..000002}}.tar") == tars
    assert expand_sources(f"{tmp_path}/sa_*.tar") == tars
    assert expand_sources([tars[2], f"{tmp_path}/sa_{{000000..000001}}.tar"]) == [tars[2], *tars[:2]]
    assert expand_sources(str(tmp_path)) == tars  # a folder of tars
    assert [sample.key for sample in read(*tars)[0]] == ["sa_0", "sa_1", "sa_2"]


@pytest.mark.parametrize("pattern", ["{tmp}/*.tar", "{tmp}", "{tmp}/a/**/*.tar"])
def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(InputError, match="no images"):
        expand_sources(pattern.format(tmp=tmp_path))


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
    assert count_images([Share(tar)], lambda key: True) == 0


@pytest.mark.parametrize("pattern", ["x/sa_{0..1.tar", "x/${NOT_THERE}.tar"])
def test_a_broken_pattern_is_named(pattern: str) -> None:
    with pytest.raises(InputError, match=r"no images: 'x/"):
        expand_sources(pattern)


def test_a_source_named_twice_is_read_once(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "sa_0.tar", {"sa_0.jpg": encoded()})
    assert expand_sources([tar, f"{tmp_path}/*.tar"]) == [tar]


# --- which of them are used ---------------------------------------------------------------------------------------


def test_one_percent_of_1000_tars_opens_10() -> None:
    sources = [f"https://mirror/sa_{number:06d}.tar" for number in range(1000)]
    picked, key_fraction = pick_sources(sources, 0.01)
    assert len(picked) == 10
    assert key_fraction == pytest.approx(1.0)
    assert picked == sorted(picked)
    # Another mirror, another mount, a pipe: the same tars.
    elsewhere = [f"pipe:aws s3 cp s3://bucket/x/sa_{number:06d}.tar -" for number in range(1000)]
    assert [p.split("sa_")[1][:6] for p in pick_sources(elsewhere, 0.01)[0]] == [p[-10:-4] for p in picked]


def test_only_the_chosen_tars_need_to_exist(tmp_path: Path) -> None:
    names = [str(tmp_path / f"sa_{number:06d}.tar") for number in range(20)]
    with pytest.raises(InputError, match="2 of 2 chosen tars or folders do not exist"):
        pick_sources(names, 0.1)
    remote = [f"http://x/sa_{number:06d}.tar" for number in range(20)]
    chosen = [name.rsplit("/", 1)[1] for name in pick_sources(remote, 0.1)[0]]
    for name in chosen:
        write_tar(tmp_path / name, {})
    assert [Path(path).name for path in pick_sources(names, 0.1)[0]] == chosen


@pytest.mark.parametrize(("tars", "fraction", "opened"), [(1, 0.25, 1), (3, 0.5, 2), (10, 0.01, 1), (4, 1.0, 4)])
def test_the_rest_of_a_fraction_is_taken_by_key(tars: int, fraction: float, opened: int) -> None:
    picked, key_fraction = pick_sources([f"http://x/{n}.tar" for n in range(tars)], fraction)
    assert len(picked) == opened
    kept = sum(keep_key(f"sa_{n}", key_fraction) for n in range(20_000)) / 20_000
    assert kept * opened / tars == pytest.approx(fraction, rel=0.1)


def test_keys_are_chosen_by_a_fixed_hash() -> None:
    # These very keys on every machine and in every version: caches depend on it.
    assert [n for n in range(60) if keep_key(f"sa_{n}", 0.1)] == [25, 33, 41, 48, 51, 53, 56]
    larger = {n for n in range(1000) if keep_key(f"sa_{n}", 0.2)}
    assert {n for n in range(1000) if keep_key(f"sa_{n}", 0.1)} <= larger


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("tars", [1, 2, 7, 10])
def test_processes_share_every_key_once(tars: int, ranks: int) -> None:
    sources = [f"{n}.tar" for n in range(tars)]
    keys = {source: [f"{source}/{n}" for n in range(300)] for source in sources}
    read_by = [
        [key for share in assign_sources(sources, rank, ranks) for key in keys[share.source] if share.holds(key)]
        for rank in range(ranks)
    ]
    assert Counter(key for mine in read_by for key in mine) == Counter(key for some in keys.values() for key in some)
    assert max(map(len, read_by)) < 1.35 * 300 * tars / ranks


def test_count_agrees_with_what_is_read(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {f"./sa_{n}.{s}": encoded() for n in range(9) for s in ("jpg", "json")})
    (tmp_path / "f").mkdir()
    for n in range(4):
        (tmp_path / "f" / f"{n}.jpg").write_bytes(encoded())
    shares = [Share(tar, 0, 2), Share(str(tmp_path / "f"))]
    assert count_images(shares, lambda key: key != "3") == sum(shares[0].holds(f"sa_{n}") for n in range(9)) + 3
    assert count_images([Share("pipe:cat x.tar")], lambda key: True) is None


# --- bad and unusual samples --------------------------------------------------------------------------------------


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
