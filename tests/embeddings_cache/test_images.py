import http.server
import io
import json
import shutil
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
from embeddings_cache.images import (
    Share,
    assign_sources,
    count_images,
    decode_image,
    expand_sources,
    keep_key,
    pick_sources,
    read_images,
)
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
    assert "no image" in skipped["lonely"]
    assert "seen before" in skipped["good"]


def test_a_tar_cut_short_gives_what_is_whole(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"sa_{n}.jpg": encoded(size=(400, 300)) for n in range(4)})
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])
    samples, skipped = read(path)
    assert 1 <= len(samples) < 4
    assert any("unexpected end" in reason for reason in skipped.values())


def test_what_is_no_tar_at_all_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>gone since January 2026</html>" * 100)
    with pytest.raises(InputError, match=r"cannot read .*a\.tar"):
        read(str(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "1")]
)
def test_other_colour_modes_become_rgb(kind: str, mode: str) -> None:
    image = decode_image(encoded(kind, mode))
    assert image.shape == (30, 40, 3)
    assert image.dtype == np.uint8


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


def test_a_single_pixel_is_an_image() -> None:
    assert decode_image(encoded("PNG", size=(1, 1))).shape == (1, 1, 3)
