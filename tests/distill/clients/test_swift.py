"""The Swift package of an export: that it is whole; and its arithmetic, built and run wherever Swift is, against
Pillow's and segment-anything's own numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamPredictor

from distill.evaluate.ious import mask_iou
from distill.export.coreml.encoder import pad_with_rounded_mean
from distill.export.folder import clear
from distill.export.prompts import points_of
from distill.export.swift import EXAMPLE, packages_of, run_lengths
from embeddings_cache.images import resized_shape
from embeddings_cache.images.decoding import UPRIGHT
from exports import SIZE, toy
from swift import FRAMEWORKS, PACKAGE, PROMPTS, SOURCES, driver, needs_swift, stored, swift, written

FILES = (
    "PixelSize", "SegmenterError", "Picture", "Resizing", "Half", "Prompt", "Logits", "Enlarging", "Mask", "Packages",
    "Segmenter", "ModelStore", "MultiArrays", "Drawing",
)  # fmt: skip


def test_the_folder_is_whole(tmp_path: Path) -> None:
    """Every file, names and size filled in, and answers that decode to masks of the example."""
    package = written(tmp_path)
    found = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    assert found == {
        "Package.swift", "README.md", "Sources/segment/main.swift",
        *(f"Sources/SegmentAnything/{name}.swift" for name in FILES),
        *(f"Tests/SegmentAnythingTests/{name}Tests.swift" for name in ("Arithmetic", "OnAMac")),
        f"{EXAMPLE}/example.png", f"{EXAMPLE}/expected.json",
    }  # fmt: skip
    readme = (package / "README.md").read_text()
    assert 'forResource: "SmallEncoder", withExtension: "mlmodelc"' in readme
    assert f"at {SIZE} px" in readme
    assert not any("{{" in path.read_text() for path in package.rglob("*") if path.suffix in (".swift", ".md"))
    width, height = Image.open(package / EXAMPLE / "example.png").size
    answers = json.loads((package / EXAMPLE / "expected.json").read_text())
    assert len(answers) >= 4
    assert {sum(answer["runs"]) for answer in answers} == {width * height}
    on = [sum(answer["runs"][1::2]) / (width * height) for answer in answers]
    assert 0.01 < np.median(on) < 0.9


def test_apples_frameworks_are_imported_where_they_are() -> None:
    """All else compiles anywhere."""
    for path in PACKAGE.glob("Sources/SegmentAnything/*.swift"):
        lines = path.read_text().splitlines()
        apple = any(line.endswith(f"import {name}") for line in lines for name in FRAMEWORKS)
        assert (lines[0] == "#if canImport(CoreML)" and lines[-1] == "#endif") == apple, path.name


def test_the_packages_that_swift_takes() -> None:
    encoders, decoders = ([f"A{kind}{end}.mlpackage" for end in ("_8bit", "")] for kind in ("Encoder", "Decoder"))
    assert packages_of(["encoder.onnx", *encoders, *decoders]) == ("AEncoder.mlpackage", "ADecoder.mlpackage")
    assert packages_of(["decoder.onnx", *encoders]) is None
    named = ["SamEncoderDecoder.mlpackage", "SamEncoderEncoder.mlpackage"]  # export.name=SamEncoder
    assert packages_of(named) == ("SamEncoderEncoder.mlpackage", "SamEncoderDecoder.mlpackage")


def test_the_folder_goes_with_what_it_was_made_from(tmp_path: Path) -> None:
    (tmp_path / "swift").mkdir()
    assert clear(tmp_path, {"student_sha256": "another", "page": None}) == ({}, {})
    assert not (tmp_path / "swift").exists()


def test_runs_alternate() -> None:
    assert run_lengths(np.array([[0, 1, 1], [1, 0, 1]], bool)) == [1, 3, 1, 1]
    assert run_lengths(np.array([[1, 0]], bool)) == [0, 1, 1]
    assert run_lengths(np.zeros((2, 2), bool)) == [4]


PICTURES = (
    (480, 640), (640, 480), (427, 640), (701, 467), (512, 512), (1024, 1024), (1, 1), (2, 3), (31, 977), (977, 31),
    (1, 300), (300, 1), (100, 80), (683, 1024), (1023, 1025), (1365, 2048), (1080, 1920), (2250, 1500), (3000, 4000),
    (4000, 3000), (4032, 1908), (33, 1000), (127, 129),
)  # fmt: skip
"""Heights and widths: enlarged and reduced, by whole factors and others, to 12 megapixels."""


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def columns_first(picture: np.ndarray, side: int) -> np.ndarray:
    """Pillow's two passes one by one: which it takes first depends on its version and the picture."""
    height, width = resized_shape(picture.shape[:2], side)
    narrow = Image.fromarray(picture).resize((width, picture.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(narrow.resize((width, height), Image.Resampling.BILINEAR))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = driver(tmp_path_factory.mktemp("swift"), (SOURCES / "arithmetic.swift").read_text())
    np.array([], np.float32).tofile(package / "floats")
    return package


def ask(program: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    defaults = {"width": 0, "height": 0, "side": 0, "orientation": 1, "bytesPerRow": 0, "order": "rgba", "cells": 0}
    lists: dict[str, Any] = {name: [] for name in ("at", "points", "labels", "box", "ious")}
    (program / "asked.json").write_text(json.dumps([{**defaults, **lists, **job} for job in jobs]))
    swift(program, "run", "-c", "release", "--skip-build", "driver")
    return json.loads((program / "answered.json").read_text())


def square(program: Path, number: int, side: int) -> np.ndarray:
    """The encoder's input that the program wrote, uint8 (3, side, side), RGB."""
    rows = np.fromfile(program / f"{number}.square", np.uint8).reshape(side, side * 4 + 12)
    assert (rows[:, side * 4 :] == 7).all()  # what lies between rows is left alone
    pixels = rows[:, : side * 4].reshape(side, side, 4)
    assert (pixels[..., 3] == 255).all()
    return pixels[..., 2::-1].transpose(2, 0, 1)


@pytest.mark.slow
@needs_swift
@pytest.mark.parametrize("side", [1024, 256])
def test_pictures_are_resized_as_pillow_does(program: Path, side: int) -> None:
    """To the bit, padding included, whatever the order of bytes."""
    jobs, pictures = [], []
    for height, width in PICTURES:
        if round(side * min(height, width) / max(height, width)) < 1:
            continue  # segment-anything has no picture of no rows
        order, gap = ("rgba", 0) if len(jobs) % 2 else ("bgra", 20)
        (program / f"{len(jobs)}.pixels").write_bytes(stored(noise(height, width), order, gap))
        jobs.append({"width": width, "height": height, "side": side, "bytesPerRow": width * 4 + gap, "order": order})
        pictures.append(noise(height, width))
    assert len(jobs) >= 20
    ask(program, jobs)
    for number, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        found = square(program, number, side)
        expected = pad_with_rounded_mean(columns_first(picture, side), side)[0]
        np.testing.assert_array_equal(found, expected, err_msg=f"{width}×{height}")
        rows, columns = resized_shape((height, width), side)
        at_once = np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BILINEAR))
        off = np.abs(found.astype(int) - pad_with_rounded_mean(at_once, side)[0]).max()
        assert off <= (height > 2 * width), f"{width}×{height}"  # Pillow 13 takes the rows first in tall ones


@pytest.mark.slow
@needs_swift
def test_pictures_are_turned_upright_as_exif_says(program: Path) -> None:
    picture, side = noise(90, 61), 64
    jobs = [{"width": 61, "height": 90, "side": side, "bytesPerRow": 256, "orientation": turn} for turn in range(10)]
    for number in range(10):
        (program / f"{number}.pixels").write_bytes(stored(picture, "rgba", 256 - 61 * 4))
    ask(program, jobs)
    for turn in range(10):
        upright = Image.fromarray(picture)
        upright = upright.transpose(UPRIGHT[turn]) if turn in UPRIGHT else upright
        expected = pad_with_rounded_mean(columns_first(np.asarray(upright), side), side)[0]
        np.testing.assert_array_equal(square(program, turn, side), expected, err_msg=f"orientation {turn}")


@pytest.mark.slow
@needs_swift
def test_halves_are_numpys(program: Path) -> None:
    rng = np.random.default_rng(0)
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)].astype(np.float32)
    between = (finite[:-1] + finite[1:]) / 2  # where the nearest is not clear
    drawn = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    floats = np.concatenate([every.astype(np.float32), between, np.nextafter(between, 0), drawn])
    floats.tofile(program / "floats")
    ask(program, [])
    np.array([], np.float32).tofile(program / "floats")
    found = np.fromfile(program / "halves.floats", np.float32)
    np.testing.assert_array_equal(found, every.astype(np.float32))
    numbers = ~np.isnan(floats)
    with np.errstate(over="ignore"):
        expected = floats.astype(np.float16)
    halves = np.fromfile(program / "floats.halves", np.uint16)
    np.testing.assert_array_equal(halves[numbers], expected.view(np.uint16)[numbers])
    assert np.isnan(halves.view(np.float16)[~numbers]).all()


def strided(masks: torch.Tensor) -> bytes:
    """Logits (4, cells, cells) in float16, five elements between rows, as those of a Neural Engine may lie."""
    room = torch.full((*masks.shape[:2], masks.shape[2] + 5), torch.nan)
    room[..., : masks.shape[2]] = masks
    return room.half().numpy().tobytes()


@pytest.mark.slow
@needs_swift
@pytest.mark.parametrize("cells", [256, 64])
def test_masks_are_segment_anythings(program: Path, cells: int) -> None:
    """Prompts, the choice among four masks, and their pixels, from float16 logits at the picture's size or another."""
    sam = toy(4 * cells) if cells == 64 else toy()
    predictor, rng = SamPredictor(sam), np.random.default_rng(0)
    predictor.transform.target_length = 4 * cells
    jobs, expected = [], []
    for number, (height, width) in enumerate(PICTURES):
        share = PROMPTS[number % len(PROMPTS)]
        if round(4 * cells * min(height, width) / max(height, width)) < 1:
            continue
        fields = torch.from_numpy(rng.normal(size=(1, 4, 9, 9)).astype(np.float32)) * 8
        logits = torch.nn.functional.interpolate(fields, (cells, cells), mode="bicubic")[0].half().float()
        ious = rng.random(4).astype(np.float32)
        scale = np.array([width, height])
        points = np.array(share.get("points", np.empty((0, 2)))) * scale
        box = np.array(share["box"]) * np.tile(scale, 2) if "box" in share else None
        at = (height, width) if number % 3 else (-(-height // 3), -(-width // 3))
        if cells == 64:
            at = height, width

        multimask = len(points) == 1 and box is None
        mask = 1 + int(ious[1:].argmax()) if multimask else 0
        inside = resized_shape((height, width), 4 * cells)
        enlarged = torch.nn.functional.interpolate(logits[None], 2 * (4 * cells,), mode="bilinear")
        shown = torch.nn.functional.interpolate(enlarged[..., : inside[0], : inside[1]], at, mode="bilinear")
        if cells == 64:
            np.testing.assert_array_equal(shown, sam.postprocess_masks(logits[None], inside, (height, width)))
        predictor.original_size = height, width
        prompt = {"point_coords": points, "point_labels": np.array(share.get("labels", []))}
        coords, labels = points_of(predictor, prompt if box is None else {**prompt, "box": box})
        expected.append((shown[0, mask].numpy() > 0, mask, coords[0], labels[0]))

        (program / f"{len(jobs)}.logits").write_bytes(strided(logits))
        job = {"width": width, "height": height, "cells": cells, "at": [at[1], at[0]], "ious": ious.tolist()}
        job |= {
            "points": points.tolist(),
            "labels": share.get("labels", []),
            "box": [] if box is None else box.tolist(),
        }
        jobs.append(job)
    differing = 0
    for number, (answer, (truth, mask, coords, labels)) in enumerate(zip(ask(program, jobs), expected, strict=True)):
        found = np.fromfile(program / f"{number}.mask", np.uint8).reshape(truth.shape)
        assert answer["chosen"] == mask
        assert set(np.unique(found)) <= {0, 255}
        assert mask_iou(found > 0, truth) >= 0.9999
        differing += int((truth != (found > 0)).sum())
        assert answer["area"] == np.count_nonzero(found)
        rows, columns = np.nonzero(found)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else []
        assert answer["box"] == box
        given = labels >= 0
        there = np.array(answer["labels"]) >= 0
        assert len(answer["labels"]) == 18
        np.testing.assert_array_equal(np.array(answer["labels"])[there], labels[given])
        np.testing.assert_array_equal(np.float32(answer["coords"]).reshape(18, 2)[there], coords[given])
    shares = [truth.mean() for truth, *_ in expected]
    assert 0.2 < np.median(shares) < 0.8  # or there would be nothing to compare
    print(f"{differing} of {sum(truth.size for truth, *_ in expected)} pixels differ")
