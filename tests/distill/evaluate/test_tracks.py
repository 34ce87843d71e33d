from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from distill.evaluate.tracks import (
    POSITIVE,
    follow_points,
    point_beside,
    read_tracks,
    spread_points,
    start_points,
)
from students import InputError

SIZE, SIDE, STEP, FRAMES = (140, 180), 80, (5, 3), 6


def texture(rng: np.random.Generator, size: tuple[int, int], contrast: float = 40) -> np.ndarray:
    noise = gaussian_filter(rng.standard_normal((*size, 3)), (1.5, 1.5, 0))
    return np.clip(128 + contrast * noise / noise.std(), 0, 255).astype(np.uint8)


def square_at(frame: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    x, y = 20 + STEP[0] * frame, 30 + STEP[1] * frame
    mask[y : y + SIDE, x : x + SIDE] = True
    return mask


@pytest.fixture
def frames() -> list[np.ndarray]:
    """A textured square that moves over a ground with another, weaker texture."""
    rng = np.random.default_rng(0)
    ground, square = texture(rng, SIZE, contrast=10), texture(rng, (SIDE, SIDE))
    clip = [ground.copy() for _ in range(FRAMES)]
    for number, frame in enumerate(clip):
        frame[square_at(number)] = square.reshape(-1, 3)
    return clip


def test_points_follow_a_moving_square(frames: list[np.ndarray]) -> None:
    points, there = start_points([square_at(0)])
    tracks = follow_points(iter(frames), points, there)
    assert tracks.points.shape == (FRAMES, 1, POSITIVE + 1, 2)
    assert tracks.visible.shape == (FRAMES, 1, POSITIVE + 1)
    expected = points[0, :-1] + np.arange(FRAMES)[:, None, None] * STEP
    on, seen = tracks.points[:, 0, :-1], tracks.visible[:, 0, :-1]
    assert seen.mean() > 0.8
    assert np.linalg.norm(on - expected, axis=-1)[seen].max() < 1
    for number in range(FRAMES):
        x, y = np.round(on[number][seen[number]]).astype(int).T
        assert square_at(number)[y, x].all()
    again = follow_points(iter(frames), *start_points([square_at(0)]))
    assert np.array_equal(again.points, tracks.points)
    assert np.array_equal(again.visible, tracks.visible)


def test_the_point_beside_stays_with_the_ground(frames: list[np.ndarray]) -> None:
    points, there = start_points([square_at(0)])
    tracks = follow_points(frames, points, there)
    beside, seen = tracks.points[:, 0, -1], tracks.visible[:, 0, -1]
    assert seen[0]
    assert np.linalg.norm(beside[seen] - points[0, -1], axis=1).max() < 1


def test_a_point_that_is_covered_does_not_come_back(frames: list[np.ndarray]) -> None:
    points, there = start_points([square_at(0)])
    tracks = follow_points([*frames[:2], np.full_like(frames[2], 128), *frames[3:]], points, there)
    assert tracks.visible[1, 0, :-1].mean() > 0.8
    assert not tracks.visible[2:].any()
    assert np.array_equal(tracks.points[-1], tracks.points[1])  # it stays where it was seen last


def test_the_way_back_tells_what_is_lost(frames: list[np.ndarray]) -> None:
    points, there = start_points([square_at(0)])
    elsewhere = texture(np.random.default_rng(1), SIZE)  # Lucas–Kanade finds something there for nearly every point
    tracks = follow_points([*frames[:2], elsewhere, *frames[3:]], points, there)
    seen = tracks.visible[:, 0, :-1]
    assert seen[1].mean() > 0.8
    assert seen[2].mean() < 0.7
    assert (seen[1:] <= seen[:-1]).all()


def test_points_that_are_not_there_are_not_followed(frames: list[np.ndarray]) -> None:
    points, there = start_points([square_at(0)])
    there[0, 3] = False
    visible = follow_points(frames, points, there).visible
    assert not visible[:, 0, 3].any()
    assert visible[-1, 0].any()


def test_points_lie_all_over_a_mask() -> None:
    y, x = np.ogrid[:120, :160]
    ring = np.hypot(y - 60, x - 80)
    mask = (ring < 50) & (ring > 30)
    points = spread_points(mask)
    assert points.shape == (POSITIVE, 2)
    assert mask[points[:, 1].astype(int), points[:, 0].astype(int)].all()
    assert min(np.hypot(*(one - other)) for one, other in combinations(points, 2)) > 8
    pixels = np.argwhere(mask)[:, ::-1]
    assert np.linalg.norm(pixels[:, None] - points, axis=2).min(axis=1).max() < 22
    # They keep away from the boundary: SAM takes a click there for either side.
    depth = 10 - np.abs(np.hypot(points[:, 1] - 60, points[:, 0] - 80) - 40)
    assert depth.mean() > 5
    assert np.array_equal(points, spread_points(mask.copy()))


@pytest.mark.parametrize("pixels", [1, 3, 15, 16, 17])
def test_a_tiny_mask_has_as_many_points(pixels: int) -> None:
    mask = np.zeros((30, 40), dtype=bool)
    mask[5, 7 : 7 + pixels] = True
    points = spread_points(mask)
    assert points.shape == (POSITIVE, 2)
    assert mask[points[:, 1].astype(int), points[:, 0].astype(int)].all()
    assert len(np.unique(points, axis=0)) >= min(pixels, POSITIVE) - 1


def test_points_beside_are_on_no_object() -> None:
    one, other = np.zeros((2, 100, 100), dtype=bool)
    one[30:60, 10:40], other[30:60, 40:70] = True, True
    points, there = start_points([one, other])
    assert there.all()
    for mask, (x, y) in zip((one, other), points[:, -1].astype(int), strict=True):
        assert not (one | other)[y, x]
        gap = np.linalg.norm(np.argwhere(mask) - (y, x), axis=1).min()
        assert 2 < gap <= 0.1 * np.hypot(100, 100)
    everything = np.ones((100, 100), dtype=bool)
    assert point_beside(one, everything) is None
    _, there = start_points([everything])
    assert there[0, :-1].all()
    assert not there[0, -1]


def test_tracks_are_read_as_they_were_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points, visible = rng.uniform(0, 100, (4, 2, 9, 2)).astype(np.float32), rng.uniform(size=(4, 2, 9)) > 0.5
    points[~visible] = np.nan  # as some trackers have it
    np.savez(tmp_path / "clip.npz", points=points, visible=visible)
    tracks = read_tracks(tmp_path / "clip.npz", 4, 2)
    assert np.array_equal(tracks.points, points, equal_nan=True)
    assert np.array_equal(tracks.visible, visible)


GOOD = {"points": np.zeros((4, 2, 9, 2)), "visible": np.ones((4, 2, 9), dtype=bool)}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"points": GOOD["points"]}, "has no points and visible"),
        ({**GOOD, "points": np.zeros((5, 2, 9, 2))}, "points of 5 frames and 2 objects, not of 4 and 2"),
        ({**GOOD, "points": np.zeros((4, 3, 9, 2))}, "points of 4 frames and 3 objects, not of 4 and 2"),
        ({**GOOD, "points": np.zeros((4, 2, 9, 3))}, "points are float64"),
        ({**GOOD, "points": np.zeros((4, 2, 1, 2))}, "points are float64"),
        ({**GOOD, "points": np.zeros((4, 18, 2))}, "points are float64"),
        ({**GOOD, "points": np.zeros((4, 2, 9, 2), dtype=int)}, "points are int64"),
        ({**GOOD, "visible": np.ones((4, 2, 9))}, "visible is float64"),
        ({**GOOD, "visible": np.ones((4, 9, 2), dtype=bool)}, "visible is bool"),
        ({**GOOD, "points": np.full((4, 2, 9, 2), np.nan)}, "visible are nowhere"),
        ({**GOOD, "points": np.full((4, 2, 9, 2), None)}, "has no points and visible"),
    ],
)
def test_other_tracks_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "clip.npz", **arrays)
    with pytest.raises(InputError, match=rf"clip\.npz.*{said}"):
        read_tracks(tmp_path / "clip.npz", 4, 2)


def test_damaged_tracks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip.npz"
    with pytest.raises(InputError, match=r"clip\.npz: no such file"):
        read_tracks(path, 4, 2)
    np.savez(path, **GOOD)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"clip\.npz has no points and visible"):
        read_tracks(path, 4, 2)
