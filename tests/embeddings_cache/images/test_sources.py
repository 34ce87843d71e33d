import bz2
import gzip
import lzma
from collections import Counter
from pathlib import Path

import pytest

from embeddings_cache.images.samples import Account, read_images
from embeddings_cache.images.sources import Share, assign_sources, expand_sources, keep_key, pick_sources
from pictures import ANNOTATION, encoded, left_out, read, write_tar, write_zip
from students import InputError


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


@pytest.mark.parametrize("pattern", ["x/sa_{0..1.tar", "x/${NOT_THERE}.tar"])
def test_a_broken_pattern_is_named(pattern: str) -> None:
    with pytest.raises(InputError, match=r"no images: 'x/"):
        expand_sources(pattern)


def test_a_glob_of_pictures_is_one_place(tmp_path: Path) -> None:
    for name in ("b/1.jpg", "a/2.PNG", "a/notes.txt", "a/1.jpg", "c.zip/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded("PNG" if name.endswith("PNG") else "JPEG"))
    (tmp_path / "a" / "1.json").write_bytes(ANNOTATION)
    pattern = f"{tmp_path}/*/*.jpg"
    assert expand_sources(pattern) == [pattern]
    samples, skipped = read(pattern)
    assert [(s.key, s.annotation is not None) for s in samples] == [("a/1", True), ("b/1", False), ("c.zip/x", False)]
    assert skipped == {}
    one = str(tmp_path / "a" / "1.jpg")
    assert expand_sources(one) == [one]
    assert [(s.key, s.annotation is not None) for s in read(one)[0]] == [("1", True)]
    assert pick_sources([pattern, one], 1.0)[0] == [pattern, one]
    assert [share.parts for share in assign_sources([pattern], 0, 2)] == [2]
    with pytest.raises(InputError, match=r"matches neither picture, tar, zip nor folder, but .*notes\.txt"):
        expand_sources(f"{tmp_path}/a/*.txt")


def test_a_glob_passes_over_folders_with_nothing_in_them(tmp_path: Path) -> None:
    """As COCO's own: pictures in two folders, and beside them one of annotations."""
    for folder in ("train2017", "val2017", "annotations"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train2017" / "a.jpg").write_bytes(encoded())
    write_tar(tmp_path / "val2017" / "._b.tar", {})
    write_tar(tmp_path / "val2017" / "b.tar", {"b.jpg": encoded()})
    (tmp_path / "annotations" / "instances.json").write_text("{}")
    assert expand_sources(f"{tmp_path}/*") == [f"{tmp_path}/train2017", f"{tmp_path}/val2017/b.tar"]
    with pytest.raises(InputError, match="matches neither picture"):
        expand_sources(f"{tmp_path}/anno*")


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_is_lost_is_told_by_one_process(ranks: int, tmp_path: Path) -> None:
    names = [f"{n}.{suffix}" for n in range(12) for suffix in (("jpg",) if n % 3 else ("json",))]
    tar = write_tar(tmp_path / "x.tar", {name: encoded() if "jpg" in name else ANNOTATION for name in names})
    told: list[str] = []
    for rank in range(ranks):
        account = Account(lambda key, why: told.append(key))
        list(read_images([Share(tar, rank, ranks)], account=account))
    assert sorted(told) == sorted(str(n) for n in range(0, 12, 3))


def test_a_glob_takes_what_is_nested_once(tmp_path: Path) -> None:
    (tmp_path / "photos" / "2024").mkdir(parents=True)
    (tmp_path / "photos" / "2024" / "a.jpg").write_bytes(encoded())
    (tmp_path / "photos" / "b.jpg").write_bytes(encoded())
    write_zip(tmp_path / "more.zip", {"c.jpg": encoded()})
    samples, skipped = read(*(sources := expand_sources(f"{tmp_path}/**")))
    assert sorted(sample.key for sample in samples) == ["photos/2024/a", "photos/b"]
    assert (skipped, left_out(*sources)) == ({}, {".zip": 1})  # as in a folder of photographs
    samples, skipped = read(*expand_sources(f"{tmp_path}/*"))
    assert sorted(sample.key for sample in samples) == ["2024/a", "b", "c"]
    assert skipped == {}


def test_archives_of_every_kind_in_a_folder(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "a.tar", {"a.jpg": encoded()}))
    for suffix, module in (("tar.gz", gzip), ("tgz", gzip), ("tar.bz2", bz2), ("tar.xz", lzma)):
        content = Path(write_tar(tmp_path / "x", {f"{suffix}.jpg": encoded()})).read_bytes()
        (tmp_path / f"b.{suffix}").write_bytes(module.compress(content))
    (tmp_path / "x").unlink()
    write_zip(tmp_path / "z.zip", {"z.jpg": encoded()})
    samples, skipped = read(*expand_sources(str(tmp_path)))
    assert [sample.key for sample in samples] == ["a", "tar.bz2", "tar.gz", "tar.xz", "tgz", "z"]
    assert skipped == {}
    assert path.exists()


@pytest.mark.parametrize("name", ["a{1,2}", "photos [2024]", "what*?"])
def test_a_folder_is_what_it_is_called(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "1.jpg").write_bytes(encoded())
    assert expand_sources(str(folder)) == [str(folder)]
    assert [sample.key for sample in read(str(folder))[0]] == ["1"]
    (folder / "1.jpg").rename(tmp_path / "1.jpg")
    write_tar(folder / "x.tar", {"2.jpg": encoded()})
    assert [sample.key for sample in read(*expand_sources(str(folder)))[0]] == ["2"]


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "1.jpg").write_bytes(encoded())
    assert expand_sources("~") == [str(tmp_path)]
    assert expand_sources("~/*.jpg") == [f"{tmp_path}/*.jpg"]


def test_a_source_named_twice_is_read_once(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "sa_0.tar", {"sa_0.jpg": encoded()})
    assert expand_sources([tar, f"{tmp_path}/*.tar"]) == [tar]


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


def tars_of(directory: Path, counts: list[int]) -> list[str]:
    """Tars of so many tiny images each, with keys that differ everywhere."""
    picture = encoded(size=(8, 8))
    return [
        write_tar(directory / f"{tar}.tar", {f"sa_{tar}_{n}.jpg": picture for n in range(count)})
        for tar, count in enumerate(counts)
    ]


def keys_by_rank(sources: list[str], ranks: int, done: frozenset[str] = frozenset()) -> list[list[str]]:
    return [
        [
            sample.key
            for sample in read_images(
                assign_sources(sources, rank, ranks, resumed=bool(done)), lambda key: key not in done
            )
        ]
        for rank in range(ranks)
    ]


@pytest.mark.parametrize(
    ("counts", "ranks"),
    [([20] * 10, 8), ([40], 3), ([30, 30], 2), ([5, 80, 7, 33], 4), ([11, 90, 14, 60], 2), ([40], 1), ([1] * 50, 6)],
)
def test_processes_share_every_image_once_and_evenly(counts: list[int], ranks: int, tmp_path: Path) -> None:
    shares = keys_by_rank(tars_of(tmp_path, counts), ranks)
    expected = {f"sa_{tar}_{n}": 1 for tar, count in enumerate(counts) for n in range(count)}
    assert Counter(key for mine in shares for key in mine) == expected
    assert max(map(len, shares)) <= max(1.1 * sum(counts) / ranks, sum(counts) // ranks + 1)


def test_what_is_left_after_a_crash_is_shared_evenly_by_any_number_of_processes(tmp_path: Path) -> None:
    """Two processes got through different parts; five go on."""
    sources = tars_of(tmp_path, [30, 30, 30, 30])
    first, second = keys_by_rank(sources, 2)
    done = frozenset(first[:50] + second[:5])
    shares = keys_by_rank(sources, 5, done)
    assert Counter(key for mine in shares for key in mine) == Counter({*first, *second} - done)
    assert max(map(len, shares)) <= 1.1 * 65 / 5


def test_a_folder_is_shared_too(tmp_path: Path) -> None:
    for n in range(30):
        (tmp_path / f"{n:02d}.jpg").write_bytes(encoded(size=(8, 8)))
    shares = keys_by_rank([str(tmp_path)], 4)
    assert sorted(key for mine in shares for key in mine) == [f"{n:02d}" for n in range(30)]
    assert max(map(len, shares)) == 8


def test_whole_tars_are_preferred(tmp_path: Path) -> None:
    """What is remote, or goes round evenly, is read by one process: nothing is read twice."""
    sources = tars_of(tmp_path, [20] * 10)
    opened = [assign_sources(sources, rank, 8) for rank in range(8)]
    assert all(sum(share.parts == 1 for share in mine) == 1 for mine in opened)
    remote = [f"https://mirror/{n}.tar" for n in range(9)]
    opened = [assign_sources(remote, rank, 4, resumed=True) for rank in range(4)]
    assert [[share.parts for share in mine] for mine in opened] == [[1, 1, 4]] * 4


def test_one_key_in_a_divided_tar_goes_to_one_process(tmp_path: Path) -> None:
    members = [(f"sa_{n}.jpg", encoded(size=(8, 8))) for n in (0, 1, 2, 0, 3, 1)]
    shares = keys_by_rank([write_tar(tmp_path / "twice.tar", members)], 3)
    assert sorted(key for mine in shares for key in mine) == ["sa_0", "sa_1", "sa_2", "sa_3"]
