"""The scripts of `export/web/`, each run by Node and compared with what it has to agree with: Pillow, segment-anything,
torchvision, pycocotools."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from segment_anything import SamPredictor
from segment_anything.utils.amg import batched_mask_to_box, build_point_grid, calculate_stability_score
from torchvision.ops import nms

from distill.export.encoder import pad_with_mean_colour
from distill.export.prompts import points_of
from embeddings_cache.images import resized_shape
from exports import SIZE, toy
from support import ROOT

WEB = ROOT / "distill" / "clients" / "web"

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")

READ = """
import { readFileSync, writeFileSync } from "node:fs";
const read = (name, type = Uint8Array) => new type(Uint8Array.from(readFileSync(name)).buffer);
const asked = JSON.parse(readFileSync("asked.json"));
const answer = (value) => writeFileSync("answered.json", JSON.stringify(value));
"""


def in_node(folder: Path, script: str, asked: Any = None) -> Any:
    """What a script hands to `answer`; the page's modules lie beside it, `read` and `asked` are at hand."""
    for module in WEB.glob("*.mjs"):
        if not (folder / module.name).exists():
            (folder / module.name).symlink_to(module)
    (folder / "asked.json").write_text(json.dumps(asked))
    (folder / "run.mjs").write_text(READ + script)
    done = subprocess.run(["node", "run.mjs"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answered = folder / "answered.json"
    return json.loads(answered.read_text()) if answered.exists() else None


RESIZE = """
import { Resizer, planes, resized } from "./resize.mjs";
for (const [number, [width, height, side]] of asked.entries()) {
  const [toWidth, toHeight] = resized(width, height, side);
  const resizer = new Resizer(width, height, toWidth, toHeight);
  const pixels = read(`${number}.rgba`);
  for (let at = 0; at < pixels.length; at += 7 * width * 4) resizer.push(pixels.subarray(at, at + 7 * width * 4));
  const rgb = resizer.finish();
  writeFileSync(`${number}.rgb`, rgb);
  const image = planes(rgb, toWidth, toHeight, side, [123.675, 116.28, 103.53]);
  writeFileSync(`${number}.planes`, new Uint8Array(image.buffer));
}
"""


def test_pictures_are_resized_as_pillow_does(tmp_path: Path) -> None:
    """To the bit, whether they shrink or grow, and in whatever portions they come."""
    sizes = [(640, 427, 256), (467, 701, 256), (100, 80, 256), (256, 256, 256), (1500, 1000, 1024), (3000, 2, 1024),
             (33, 65, 64), (60, 2500, 1024), (257, 129, 128), (1, 1, 64)]  # fmt: skip
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height, _ in sizes]
    for number, picture in enumerate(pictures):
        (tmp_path / f"{number}.rgba").write_bytes(Image.fromarray(picture).convert("RGBA").tobytes())
    in_node(tmp_path, RESIZE, sizes)
    for number, (picture, (width, height, side)) in enumerate(zip(pictures, sizes, strict=True)):
        rows, columns = resized_shape((height, width), side)
        expected = np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BILINEAR))
        found = np.frombuffer((tmp_path / f"{number}.rgb").read_bytes(), np.uint8).reshape(rows, columns, 3)
        off = np.abs(found.astype(int) - expected).max()
        assert off <= (height > 2 * width), f"{width}×{height} to {side}"  # Pillow 13 resizes tall ones otherwise
        planes = np.frombuffer((tmp_path / f"{number}.planes").read_bytes(), np.float32).reshape(3, side, side)
        np.testing.assert_array_equal(planes[None], pad_with_mean_colour(found, side))


ENLARGE = """
import { Enlarger } from "./masks.mjs";
import { maskPng } from "./png.mjs";
import { encode } from "./rle.mjs";
const found = [];
for (const [number, { cells, side, inside, size }] of asked.entries()) {
  const logits = read(`${number}.logits`, Float32Array);
  const enlarger = new Enlarger(cells, side, inside, size);
  const [width, height] = size;
  const byRows = new Float64Array(width * height);
  const byColumns = new Float64Array(width * height);
  const column = new Float64Array(height);
  for (let y = 0; y < height; y++) enlarger.row(logits, y, byRows.subarray(y * width, (y + 1) * width));
  for (let x = 0; x < width; x++) {
    enlarger.column(logits, x, column);
    column.forEach((value, y) => (byColumns[y * width + x] = value));
  }
  writeFileSync(`${number}.rows`, new Uint8Array(byRows.buffer));
  writeFileSync(`${number}.columns`, new Uint8Array(byColumns.buffer));
  writeFileSync(`${number}.mask`, enlarger.mask(logits));
  writeFileSync(`${number}.png`, new Uint8Array(await new Blob(await maskPng(enlarger, logits)).arrayBuffer()));
  found.push({ ...enlarger.survey(logits), segmentation: encode(enlarger, logits) });
}
answer(found);
"""


def test_masks_are_enlarged_described_and_saved_as_sams(tmp_path: Path) -> None:
    """Logits of `postprocess_masks`; segment-anything's boxes and stability; what Pillow and pycocotools read is one
    mask."""
    sizes = [(90, 128), (300, 211), (64, 64), (40, 1000), (513, 512), (7, 5)]  # height, width
    rng = np.random.default_rng(1)
    cells, cases, logits = SIZE // 4, [], []
    for number, size in enumerate(sizes):
        rows, columns = resized_shape(size, SIZE)
        drawn = torch.from_numpy(rng.normal(0, 3, (1, 1, 8, 8)))
        smooth = torch.nn.functional.interpolate(drawn, (cells, cells), mode="bicubic")[0, 0].float() - 1
        logits.append(smooth if number else torch.full((cells, cells), -5.0))  # the first is empty
        (tmp_path / f"{number}.logits").write_bytes(logits[-1].numpy().tobytes())
        cases.append({"cells": cells, "side": SIZE, "inside": [columns, rows], "size": [size[1], size[0]]})
    found = in_node(tmp_path, ENLARGE, cases)
    for number, (size, low_res, seen) in enumerate(zip(sizes, logits, found, strict=True)):
        expected = toy().postprocess_masks(low_res[None, None], resized_shape(size, SIZE), size)[0, 0]
        rows, columns = (
            np.fromfile(tmp_path / f"{number}.{way}", np.float64).reshape(size) for way in ("rows", "columns")
        )
        np.testing.assert_allclose(rows, expected.numpy(), atol=2e-5)
        np.testing.assert_allclose(columns, rows, atol=1e-9)
        mask = rows > 0
        shown = np.frombuffer((tmp_path / f"{number}.mask").read_bytes(), np.uint8).reshape(size)
        np.testing.assert_array_equal(shown, mask)
        with Image.open(tmp_path / f"{number}.png") as png:
            assert png.mode == "L"
            np.testing.assert_array_equal(np.asarray(png), mask * np.uint8(255))
        np.testing.assert_array_equal(coco.decode(seen["segmentation"]), mask)
        counts = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
        assert seen["segmentation"]["counts"] == counts.decode()
        assert seen["area"] == mask.sum()
        if not mask.any():
            assert seen["box"] is None
            continue
        logits_there = torch.from_numpy(rows)[None]
        assert seen["box"] == batched_mask_to_box(logits_there > 0)[0].tolist()
        assert seen["stability"] == pytest.approx(calculate_stability_score(logits_there, 0.0, 1.0).item())
    assert any(entry["area"] for entry in found)
    assert found[0]["area"] == 0


def test_runs_that_pycocotools_reads(tmp_path: Path) -> None:
    """Masks that begin and end with either value, and runs that need several groups of five bits."""
    rng = np.random.default_rng(2)
    masks = [rng.random((37, 53)) > share for share in (0.0, 0.5, 0.98, 1.0)]
    masks += [np.indices((300, 400)).sum(axis=0) > 300, np.zeros((1, 1), bool), np.ones((5000, 20), bool)]
    script = """
    import { Runs, compress } from "./rle.mjs";
    answer(asked.map((columns) => {
      const runs = new Runs();
      for (const column of columns) runs.push(column);
      return compress(runs.finish());
    }));"""
    found = in_node(tmp_path, script, [mask.T.astype(int).tolist() for mask in masks])
    for counts, mask in zip(found, masks, strict=True):
        assert counts == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def test_prompts_are_those_of_the_predictor(tmp_path: Path) -> None:
    """Coordinates, labels and padding, and which of the four masks."""
    width, height = 300, 211
    prompts = [
        {"points": [[10.5, 20, 1]], "box": None},
        {"points": [[10.5, 20, 1], [200, 100, 0]], "box": None},
        {"points": [], "box": [5, 6, 290, 200]},
        {"points": [[250, 190, 0]], "box": [5, 6, 290, 200]},
    ]
    script = """
    import { choose, toDecoder, withBox, NOTHING } from "./prompts.mjs";
    import { resized } from "./resize.mjs";
    const picture = { width: asked.width, height: asked.height };
    answer({
      decoder: asked.prompts.map((prompt) => {
        const { coords, labels } = toDecoder(prompt, picture, resized(picture.width, picture.height, asked.size));
        return { coords: [...coords], labels: [...labels], choice: choose(prompt, [0.9, 0.1, 0.8, 0.2]) };
      }),
      box: withBox(NOTHING, [9, 2, 3, 8]).box,
    });"""
    found = in_node(tmp_path, script, {"prompts": prompts, "width": width, "height": height, "size": SIZE})
    predictor = SamPredictor(toy())
    predictor.set_image(np.zeros((height, width, 3), np.uint8))
    for prompt, asked in zip(prompts, found["decoder"], strict=True):
        points = np.array([point[:2] for point in prompt["points"]]).reshape(-1, 2)
        given = {"point_coords": points, "point_labels": np.array([point[2] for point in prompt["points"]])}
        coords, labels = points_of(predictor, given | ({"box": np.array(prompt["box"])} if prompt["box"] else {}))
        np.testing.assert_allclose(np.reshape(asked["coords"], (-1, 2)), coords[0], rtol=1e-6)
        assert asked["labels"] == labels[0].tolist()
    assert [each["choice"] for each in found["decoder"]] == [2, 0, 0, 0]
    assert found["box"] == [3, 2, 9, 8]


def test_everything_is_asked_and_sifted_as_by_segment_anything(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    corners = rng.integers(0, 60, (80, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.min(axis=1) + rng.integers(0, 25, (80, 2))], axis=1)
    ious = rng.random(80)
    found = [
        {"box": box.tolist(), "predictedIou": iou, "number": n}
        for n, (box, iou) in enumerate(zip(boxes, ious, strict=True))
    ]
    script = """
    import { grid, suppress } from "./everything.mjs";
    answer({ grid: grid(5, 300, 200), kept: suppress(asked).map(({ number }) => number) });"""
    answered = in_node(tmp_path, script, found)
    np.testing.assert_allclose(answered["grid"], build_point_grid(5) * [300, 200], atol=1e-9)
    kept = nms(torch.from_numpy(boxes).double(), torch.from_numpy(ious), 0.7)
    assert answered["kept"] == kept.tolist()
    assert len(kept) < len(boxes)


def test_what_was_done_can_be_taken_back_and_brought_again(tmp_path: Path) -> None:
    script = """
    import { History, NOTHING, withPoint } from "./prompts.mjs";
    const history = new History();
    const seen = [];
    const note = () => seen.push([history.now.points.length, history.canUndo, history.canRedo]);
    note();
    history.push(withPoint(history.now, 1, 2)); note();
    history.push(withPoint(history.now, 3, 4, false)); note();
    history.move(-1); note();
    history.move(1); note();
    history.move(-1); history.move(-1); history.move(-1); note();
    history.push(NOTHING); note();
    answer(seen);"""
    assert in_node(tmp_path, script) == [
        [0, False, False], [1, True, False], [2, True, False], [1, True, True], [2, True, False],
        [0, False, True], [0, True, False],
    ]  # fmt: skip
