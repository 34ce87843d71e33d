import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from scipy.ndimage import gaussian_filter
from segment_anything import SamPredictor

from distill.evaluate import video
from distill.evaluate.decoding import Segmenter
from distill.evaluate.suite import as_table, evaluate_task
from distill.evaluate.tracks import Tracks, start_points
from distill.evaluate.video import find, label_frame, measure, settings, summarize
from distill.recipe import Recipe, load_recipe
from embeddings_cache.teacher import load_teacher
from students import InputError

SIZE, FRAMES = (112, 144), 6
STEPS = ((5, 3), (-3, -2))
"""Of the disk and the rectangle, (x, y) in pixels a frame."""


def texture(rng: np.random.Generator, mean: tuple[int, ...], size: tuple[int, int], contrast: float) -> np.ndarray:
    noise = gaussian_filter(rng.standard_normal((*size, 3)), (1.5, 1.5, 0))
    return np.clip(mean + contrast * noise / noise.std(), 0, 255).astype(np.uint8)


@cache
def drawn(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A frame of a disk and a rectangle that move, RGB, and its label map."""
    rng = np.random.default_rng(0)
    frame, labels = texture(rng, (60, 90, 60), SIZE, 12), np.zeros(SIZE, dtype=np.uint8)
    y, x = np.ogrid[:40, :40]
    shapes = [(np.hypot(y - 19.5, x - 19.5) <= 19, (200, 120, 60), 15, 20), (np.ones((30, 34)), (60, 80, 210), 95, 70)]
    for label, ((shape, colour, left, top), step) in enumerate(zip(shapes, STEPS, strict=True), 1):
        mask, body = shape > 0, texture(rng, colour, shape.shape, 25)
        left, top = left + step[0] * number, top + step[1] * number
        place = slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1])
        frame[place][mask], labels[place][mask] = body[mask], label
    return frame, labels


def write_clip(davis: Path, name: str, resolution: str = "480p", frames: int = FRAMES) -> None:
    """A sequence in DAVIS's layout."""
    for kind in ("JPEGImages", "Annotations"):
        (davis / kind / resolution / name).mkdir(parents=True)
    for number in range(frames):
        frame, labels = drawn(number)
        Image.fromarray(frame).save(davis / "JPEGImages" / resolution / name / f"{number:05d}.jpg", quality=95)
        Image.fromarray(labels).save(davis / "Annotations" / resolution / name / f"{number:05d}.png")


def exact_tracks() -> Tracks:
    """The points of the first frame, moved as the objects are; those beside them stay."""
    _, labels = drawn(0)
    points, _ = start_points([labels == 1, labels == 2])
    moved = np.repeat(points[None], FRAMES, axis=0)
    moved[:, :, :-1] += np.arange(FRAMES)[:, None, None, None] * np.array(STEPS)[:, None]
    return Tracks(moved, np.ones(moved.shape[:3], dtype=bool))


def write_tracks(folder: Path, name: str, tracks: Tracks) -> None:
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{name}.npz", points=tracks.points, visible=tracks.visible)


def recipe_of(data: Path, *others: str) -> Recipe:
    task = ("recipe=quickstart", "image_size=128", "stage=evaluate", "evaluate.task=video", "evaluate.rounds=3")
    return load_recipe([*task, f"evaluate.data={data}", *others])


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """DAVIS's folder, with one sequence."""
    write_clip(tmp_path / "DAVIS", "moving")
    return tmp_path / "DAVIS"


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(load_teacher("toy", None, 128), torch.device("cpu"))


def measured(recipe: Recipe, segmenter: Segmenter, pictures: Path) -> dict:
    [item] = find(recipe)
    return measure(item, segmenter, recipe, pictures)


def test_objects_are_found_at_points_that_are_given(davis: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    exact = exact_tracks()
    write_tracks(davis / "tracks", "moving", exact)
    recipe = recipe_of(davis)
    result = measured(recipe, segmenter, tmp_path / "pictures")
    assert result["tracks"] == "file"
    assert [len(scores[name]) for scores in result["objects"].values() for name in "JF"] == [FRAMES - 2] * 4
    numbers = summarize({"moving": result}, recipe)
    assert numbers["objects"] == 2
    assert numbers["J"] > 0.8
    assert numbers["F"] > 0.8
    assert numbers["J&F"] == pytest.approx((numbers["J"] + numbers["F"]) / 2)
    assert "note" not in numbers

    # The same points on the wrong objects.
    swapped = Tracks(exact.points[:, ::-1], exact.visible)
    write_tracks(tmp_path / "wrong", "moving", swapped)
    wrong = recipe_of(davis, f"evaluate.tracks={tmp_path / 'wrong'}")
    assert summarize({"moving": measured(wrong, segmenter, tmp_path / "others")}, wrong)["J&F"] < 0.1


def test_objects_are_found_at_points_of_lucas_kanade(davis: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    recipe = recipe_of(davis)
    result = measured(recipe, segmenter, tmp_path / "pictures")
    assert result["tracks"] == "lucas-kanade"
    numbers = summarize({"moving": result}, recipe)
    assert numbers["J&F"] > 0.8
    assert "not comparable" in numbers["note"]


def test_label_maps_are_what_was_scored(davis: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    result = measured(recipe_of(davis), segmenter, tmp_path / "pictures")
    kept = sorted((tmp_path / "pictures" / "moving").iterdir())
    assert [path.name for path in kept] == [f"{number:05d}.png" for number in range(FRAMES)]
    images = [Image.open(path) for path in kept]
    assert {image.mode for image in images} == {"P"}
    maps, truths = [np.asarray(image) for image in images], [drawn(number)[1] for number in range(FRAMES)]
    assert np.array_equal(maps[0], truths[0])
    assert set(np.unique(maps)) == {0, 1, 2}
    for number in (1, 2):
        overlap = [
            ((labels == number) & (truth == number)).sum() / ((labels == number) | (truth == number)).sum()
            for labels, truth in zip(maps, truths, strict=True)
        ]
        assert result["objects"][str(number)]["J"] == pytest.approx(overlap[1:-1])


def by_predictor(predictor: SamPredictor, points: np.ndarray, visible: np.ndarray, rounds: int) -> np.ndarray:
    """SAM-PT's passes, with segment-anything's own predictor: logits (objects, H, W)."""
    logits = []
    for place in range(len(points)):
        positive = points[place, :-1][visible[place, :-1]]
        beside = points[place, -1:][visible[place, -1:]]
        others = [points[n, :-1][visible[n, :-1]] for n in range(len(points)) if n != place]
        everything = np.concatenate([positive, beside, *others])
        labels = (np.arange(len(everything)) < len(positive)).astype(int)
        _, _, low = predictor.predict(positive, np.ones(len(positive)), multimask_output=False, return_logits=True)
        mask, _, low = predictor.predict(everything, labels, mask_input=low, multimask_output=False, return_logits=True)
        for _ in range(rounds):
            y, x = np.nonzero(mask[0] > 0)
            box = np.array([x.min(), y.min(), x.max(), y.max()])
            mask, iou, low = predictor.predict(
                everything, labels, box=box, mask_input=low, multimask_output=False, return_logits=True
            )
        assert iou[0] >= 0.7
        logits.append(mask[0])
    return np.array(logits)


def test_passes_are_those_of_sam_predictor(segmenter: Segmenter) -> None:
    tracks, (frame, _) = exact_tracks(), drawn(3)
    visible = tracks.visible[3].copy()
    visible[0, 2:7] = visible[1, -1] = False
    predictor = SamPredictor(segmenter.sam)
    predictor.set_image(frame)
    seen = segmenter.look(frame)
    for rounds in (1, 3):
        logits = by_predictor(predictor, tracks.points[3], visible, rounds)
        expected = np.argmax([np.zeros(SIZE), *logits], axis=0)
        assert np.array_equal(label_frame(seen, tracks.points[3], visible, rounds), expected)


def test_a_pixel_is_the_likelier_objects(segmenter: Segmenter) -> None:
    frame, _ = drawn(3)
    shared = exact_tracks().points[3, 0, :-1]
    points = np.stack([[*shared[::2], (3, 3)], [*shared[1::2], (3, 3)]])  # both on the disk
    visible = np.ones(points.shape[:2], dtype=bool)
    predictor = SamPredictor(segmenter.sam)
    predictor.set_image(frame)
    logits = by_predictor(predictor, points, visible, 1)
    overlap = (logits > 0).all(axis=0)
    assert overlap.sum() > 100
    assert set(np.unique(logits.argmax(axis=0)[overlap])) == {0, 1}
    for order in ([0, 1], [1, 0]):
        labels = label_frame(segmenter.look(frame), points[order], visible, 1)
        assert np.array_equal(labels[overlap], logits[order].argmax(axis=0)[overlap] + 1)


def test_only_points_that_are_seen_count(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    tracks, (frame, truth) = exact_tracks(), drawn(3)
    seen, points, visible = segmenter.look(frame), tracks.points[3], tracks.visible[3]
    assert set(np.unique(label_frame(seen, points, visible, 1))) == {0, 1, 2}
    hidden = visible.copy()
    hidden[0, :-1] = False
    assert set(np.unique(label_frame(seen, points, hidden, 1))) == {0, 2}
    # At the very edge of the frame, or beyond it, points are not seen, whatever their tracker says.
    away = points.copy()
    away[1, :-1] = SIZE[1] - 1, 60
    labels = label_frame(seen, away, visible, 1)
    assert set(np.unique(labels)) == {0, 1}
    assert (labels[truth == 1] == 1).mean() > 0.8
    monkeypatch.setattr(video, "MIN_PREDICTED_IOU", 2.0)
    assert not label_frame(seen, points, visible, 1).any()


def test_numbers_of_objects_are_the_annotations(davis: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    for path in (davis / "Annotations/480p/moving").iterdir():
        labels = np.asarray(Image.open(path))
        others = np.array([0, 7, 3], dtype=np.uint8)[labels]
        others[:4] = 255  # nobody's, and no object
        Image.fromarray(others).save(path)
    result = measured(recipe_of(davis), segmenter, tmp_path / "pictures")
    assert list(result["objects"]) == ["3", "7"]
    assert np.mean([scores["J"] for scores in result["objects"].values()]) > 0.8
    assert set(np.unique(np.asarray(Image.open(tmp_path / "pictures/moving/00000.png")))) == {0, 3, 7}


def test_objects_count_alike_however_long_their_video(davis: Path) -> None:
    results = {
        "short": {"1": {"J": [1.0], "F": [0.5]}},
        "long": {"1": {"J": [0.0] * 9, "F": [0.0, 1.0, 0.5]}, "2": {"J": [0.5, 0.1], "F": [0.2]}},
    }
    numbers = summarize(
        {key: {"objects": objects, "tracks": "file"} for key, objects in results.items()}, recipe_of(davis)
    )
    assert numbers["J"] == pytest.approx((1 + 0 + 0.3) / 3)
    assert numbers["F"] == pytest.approx((0.5 + 0.5 + 0.2) / 3)


@pytest.mark.parametrize("resolution", ["480p", "Full-Resolution", ""])
@pytest.mark.parametrize("given", ["DAVIS", ""])
def test_layouts(tmp_path: Path, resolution: str, given: str) -> None:
    write_clip(tmp_path / "DAVIS", "one", resolution, frames=3)
    write_clip(tmp_path / "DAVIS", "another", resolution, frames=4)
    (tmp_path / "DAVIS/JPEGImages" / resolution / "empty").mkdir()
    clips = find(recipe_of(tmp_path / given))
    assert [(clip.key, len(clip.frames), clip.tracks) for clip in clips] == [("another", 4, None), ("one", 3, None)]
    assert len(clips[0].files) == 8
    assert all(path.exists() for clip in clips for path in clip.files)


def test_val_txt_says_which_sequences(davis: Path) -> None:
    for name in ("b", "a"):
        shutil.copytree(davis / "JPEGImages/480p/moving", davis / "JPEGImages/480p" / name)
    listed = davis / "ImageSets/2017/val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("b\nmoving\n")
    assert [clip.key for clip in find(recipe_of(davis))] == ["b", "moving"]
    listed.write_text("b\nc\nd\nmoving\n")
    with pytest.raises(InputError, match=r"has no frames of c, nor of 1 others of .*val\.txt"):
        find(recipe_of(davis))


def test_other_folders_are_refused(davis: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not laid out as DAVIS 2017"):
        find(recipe_of(davis / "JPEGImages"))
    with pytest.raises(InputError, match="nothing is no folder"):
        find(recipe_of(davis, f"evaluate.tracks={tmp_path / 'nothing'}"))
    shutil.rmtree(davis / "JPEGImages/480p/moving")
    with pytest.raises(InputError, match="has no folder of frames"):
        find(recipe_of(davis))


def test_every_sequence_has_its_tracks(davis: Path, tmp_path: Path) -> None:
    assert settings(recipe_of(davis)) == {"rounds": 3, "tracks": "lucas-kanade"}
    write_tracks(davis / "tracks", "moving", exact_tracks())
    of_the_data = settings(recipe_of(davis))["tracks"]
    assert set(of_the_data) == {"moving"}
    assert find(recipe_of(davis))[0].files[-1] == davis / "tracks/moving.npz"
    changed = replace(exact_tracks(), points=exact_tracks().points + 1)
    write_tracks(tmp_path / "named", "moving", changed)
    assert settings(recipe_of(davis, f"evaluate.tracks={tmp_path / 'named'}"))["tracks"] != of_the_data
    write_clip(davis, "second")
    with pytest.raises(InputError, match=r"tracks has no second\.npz"):
        find(recipe_of(davis))


def damage(davis: Path, kind: str) -> None:
    frames, annotations = davis / "JPEGImages/480p/moving", davis / "Annotations/480p/moving"
    if kind == "first annotation":
        (annotations / "00000.png").unlink()
    elif kind == "no object":
        Image.fromarray(np.full(SIZE, 255, dtype=np.uint8)).save(annotations / "00000.png")
    elif kind == "annotation":
        (annotations / "00003.png").unlink()
    elif kind == "size of an annotation":
        Image.fromarray(np.ones((50, 60), dtype=np.uint8)).save(annotations / "00003.png")
    elif kind == "frame":
        (frames / "00004.jpg").write_bytes((frames / "00004.jpg").read_bytes()[:900])
    elif kind == "size of a frame":
        Image.fromarray(np.zeros((50, 60, 3), dtype=np.uint8)).save(frames / "00004.jpg")
    elif kind == "two frames":
        for number in range(2, FRAMES):
            (frames / f"{number:05d}.jpg").unlink()
    elif kind == "tracks of another":
        write_tracks(davis / "tracks", "moving", Tracks(exact_tracks().points[:4], exact_tracks().visible[:4]))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("first annotation", r"00000\.png: no such file"),
        ("no object", r"00000\.png shows no object"),
        ("annotation", r"00003\.png: no such file"),
        ("size of an annotation", r"00003\.png has 60×50 px, the first annotation 144×112"),
        ("frame", r"00004\.jpg: cannot be read"),
        ("size of a frame", r"00004\.jpg has 60×50 px, the first annotation 144×112"),
        ("two frames", r"moving has 2 frames"),
        ("tracks of another", r"moving\.npz: points of 4 frames and 2 objects, not of 6 and 2"),
    ],
)
def test_bad_sequences_are_refused(davis: Path, segmenter: Segmenter, tmp_path: Path, kind: str, said: str) -> None:
    damage(davis, kind)
    with pytest.raises(InputError, match=said):
        measured(recipe_of(davis, "evaluate.rounds=0"), segmenter, tmp_path / "pictures")


def test_a_bad_sequence_is_skipped(davis: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    write_clip(davis, "good", frames=4)
    damage(davis, "first annotation")
    recipe = recipe_of(davis, "checkpoint=teacher", f"run_dir={tmp_path / 'run'}", "evaluate.rounds=1")
    assert evaluate_task(recipe, accelerator)
    section = json.loads((tmp_path / "run/evaluation.json").read_text())["video"]
    [numbers] = section["results"].values()
    assert numbers["sequences"] == 1
    assert list(numbers["skipped"]) == ["moving"]
    assert numbers["J&F"] > 0.7
    assert "1 skipped" in as_table(section)
    assert list((tmp_path / "run").rglob("good/00003.png"))
    assert evaluate_task(recipe, accelerator)  # it may have been the disk
