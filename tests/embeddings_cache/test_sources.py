from collections import Counter
from pathlib import Path

import pytest

from embeddings_cache.sources import assign_sources, expand_sources, keep_key, pick_sources
from pictures import encoded, read, write_tar
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
