"""`export/transformers_js/` in transformers.js itself, from npm, in Node and in a browser, with remote models off;
`SamPredictor` says what it has to come to."""

import base64
import json
import shutil
import subprocess
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from PIL import Image
from segment_anything import SamPredictor

from browser import browsing, served
from distill.evaluate.ious import mask_iou
from distill.export.encoder import RgbEncoder
from distill.export.hub import export_transformers_js
from distill.export.onnx import encoder_model
from distill.export.subject import Subject
from distill.schema import NEWEST_OPSET
from embeddings_cache.images import resize_longest_side
from embeddings_cache.images.scenes import generate_scene
from exports import SIZE, reference_of, scene_row, small_student, toy
from students import build_student_sam
from support import CHROMIUM

PACKAGE = "@huggingface/transformers@4.3.2"

DTYPES = {"fp32": 0.99, "fp16": 0.98, "q8": 0.8}
"""And the least mean IoU of masks with PyTorch's."""

PICTURES = {"landscape": (427, 640), "portrait": (701, 467), "square": (512, 512)}
"""Height and width."""

RUN = """
import { readFileSync, writeFileSync } from "node:fs";
import sharp from "sharp";
import { AutoModelForMaskGeneration, AutoProcessor, RawImage, SamModel, env } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const asked = JSON.parse(readFileSync("asked.json"));
const processor = await AutoProcessor.from_pretrained("transformers_js");
const known = await AutoModelForMaskGeneration.from_pretrained("transformers_js", { dtype: "fp32" });
const results = { model: known.constructor.name, masks: [] };
for (const [file, side] of asked.resized)
  await sharp(`${file}.png`).resize(side, side, { fit: "inside", kernel: "linear" }).toFile(`${file}_by_sharp.png`);
for (const dtype of asked.dtypes) {
  const model = await SamModel.from_pretrained("transformers_js", { dtype });
  for (const { picture, prompts } of asked.pictures) {
    const image = await RawImage.read(`${picture}.png`);
    const { pixel_values, original_sizes, reshaped_input_sizes } = await processor(image);
    const embeddings = await model.get_image_embeddings({ pixel_values });
    for (const prompt of prompts) {
      const inputs = await processor(image, prompt);
      const { input_points, input_labels } = inputs;
      const kept = await model({ ...embeddings, input_points, input_labels });
      const { iou_scores, pred_masks } = await model(inputs);
      const apart = Math.max(...pred_masks.data.map((value, place) => Math.abs(value - kept.pred_masks.data[place])));
      const [masks] = await processor.post_process_masks(pred_masks, original_sizes, reshaped_input_sizes);
      const bytes = Buffer.from(masks.data.buffer, masks.data.byteOffset, masks.data.byteLength).toString("base64");
      results.masks.push({ dtype, picture, dims: masks.dims, bytes, apart, ious: Array.from(iou_scores.data) });
    }
  }
}
writeFileSync("answered.json", JSON.stringify(results));
"""


PAGE = """<!doctype html>
<script type="module">
import {
  AutoProcessor, RawImage, SamModel, env,
} from "./node_modules/@huggingface/transformers/dist/transformers.min.js";

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "/models/";
env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";
window.masks = async (picture, prompt, options) => {
  const processor = await AutoProcessor.from_pretrained("transformers_js");
  const model = await SamModel.from_pretrained("transformers_js", options);
  const inputs = await processor(await RawImage.read(picture), prompt);
  const { pred_masks } = await model(inputs);
  const [masks] = await processor.post_process_masks(pred_masks, inputs.original_sizes, inputs.reshaped_input_sizes);
  return { dims: masks.dims, bits: Array.from(masks.data).join("") };
};
</script>
"""


def prompts_on(height: int, width: int) -> list[dict[str, Any]]:
    """As transformers.js takes them, in pixels of the picture: clicks, a box, both, and two prompts at once."""
    click, other = [width * 0.4, height * 0.5], [width * 0.7, height * 0.3]
    box = [[width * 0.2, height * 0.2], [width * 0.7, height * 0.8]]
    return [
        {"input_points": [[click]]},
        {"input_points": [[click, other]], "input_labels": [[1, 0]]},
        {"input_points": [box], "input_labels": [[2, 3]]},
        {"input_points": [[click, *box]], "input_labels": [[1, 2, 3]]},
        {"input_points": [[click], [other]]},
    ]


def predicted(predictor: SamPredictor, prompt: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """`SamPredictor`'s masks (P, 3, H, W) and predicted IoUs (P, 3)."""
    points = np.array(prompt["input_points"])
    kinds = np.array(prompt.get("input_labels", np.ones(points.shape[:2])))
    answers = []
    for coords, labels in zip(points, kinds, strict=True):
        clicks, corners = labels < 2, labels >= 2
        given = {"point_coords": coords[clicks], "point_labels": labels[clicks]} if clicks.any() else {}
        box = coords[corners].reshape(-1) if corners.any() else None
        answers.append(predictor.predict(**given, box=box, multimask_output=True)[:2])
    masks, ious = zip(*answers, strict=True)
    return np.stack(masks), np.stack(ious)


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers.js in it."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs Node and npm")
    directory = tmp_path_factory.mktemp("npm")
    (directory / "package.json").write_text('{"type": "module"}')
    command = [shutil.which("npm") or "npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", PACKAGE]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"npm cannot install {PACKAGE}: {done.stderr.strip().splitlines()[-1]}")
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    student = small_student()
    subject = Subject("repvit_m0_9", "toy", None, student, student, build_student_sam(student, toy()), None)
    encoder = partial(encoder_model, RgbEncoder(student).eval(), True, NEWEST_OPSET)
    path = tmp_path_factory.mktemp("export") / "transformers_js"
    pictures = [scene_row(seed).pixels() for seed in range(4, 12)]
    export_transformers_js(path, subject, reference_of(), encoder, pictures, 17, reference_of)
    return path


@pytest.mark.slow
def test_masks_in_node_are_those_of_pytorch(npm: Path, folder: Path) -> None:
    """On pictures that are resized already, where every pixel is the same; on photographs it resizes by Lanczos and
    rounds down, where Pillow is bilinear; `sharp` by itself comes nearer."""
    sam = build_student_sam(small_student(), toy())
    pictures, asked = {}, []
    for seed, (name, (height, width)) in enumerate(PICTURES.items()):
        scene = Image.fromarray(generate_scene(np.random.default_rng(seed), 800)[0]).resize((width, height))
        pictures[f"{name}_photo"] = pictures[f"{name}_photo_by_sharp"] = np.asarray(scene)
        pictures[name] = resize_longest_side(np.asarray(scene), SIZE)
        for key in (f"{name}_photo", name):
            Image.fromarray(pictures[key]).save(npm / f"{key}.png")
    shown = {name: np.asarray(picture).shape[:2] for name, picture in pictures.items()}
    for name in PICTURES:
        shown[f"{name}_photo_by_sharp"] = shown[name]
    asked = [{"picture": name, "prompts": prompts_on(*sides)} for name, sides in shown.items()]
    kinds = {"fp32": "", "fp16": "_fp16", "q8": "_quantized"}
    dtypes = [dtype for dtype, end in kinds.items() if len(list(folder.glob(f"onnx/*r{end}.onnx"))) == 2]
    assert dtypes[:2] == ["fp32", "fp16"]  # 8 bits are left out where masks do not hold
    (npm / "asked.json").write_text(
        json.dumps({"dtypes": dtypes, "pictures": asked, "resized": [[f"{name}_photo", SIZE] for name in PICTURES]})
    )
    (npm / "run.mjs").write_text(RUN)
    done = subprocess.run(
        ["node", "run.mjs", f"{folder.parent}/"], cwd=npm, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "will be ignored" not in done.stderr
    answered = json.loads((npm / "answered.json").read_text())
    assert answered["model"] == "SamModel"
    predictor, agreements = SamPredictor(sam), {}
    found = iter(answered["masks"])
    for dtype in dtypes:
        for entry in asked:
            name = entry["picture"]
            predictor.set_image(pictures[name.removesuffix("_photo_by_sharp")] if "sharp" in name else pictures[name])
            for prompt in entry["prompts"]:
                answer = next(found)
                assert (answer["dtype"], answer["picture"]) == (dtype, name)
                assert answer["apart"] <= 1e-4, "an embedding that is kept makes other masks"
                masks = np.frombuffer(base64.b64decode(answer["bytes"]), np.uint8).reshape(answer["dims"]) > 0
                expected, ious = predicted(predictor, prompt)
                assert masks.shape == expected.shape
                pairs = zip(masks.reshape(-1, *shown[name]), expected.reshape(-1, *shown[name]), strict=True)
                each = [mask_iou(*pair) for pair in pairs]
                kind = "by sharp" if "sharp" in name else "photo" if "photo" in name else "same pixels"
                agreements.setdefault((dtype, kind), []).extend(each)
                if dtype == "fp32" and kind == "same pixels":
                    assert min(each) >= 0.99, (name, prompt, each)
                    np.testing.assert_allclose(np.array(answer["ious"]).reshape(ious.shape), ious, atol=1e-3)
    means = {key: fmean(values) for key, values in agreements.items()}
    print(means)
    for dtype in dtypes:
        assert means[dtype, "same pixels"] >= DTYPES[dtype], means
    assert means["fp32", "by sharp"] > means["fp32", "photo"] > 0.7, means


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_masks_in_a_browser_are_those_of_pytorch(npm: Path, folder: Path, tmp_path: Path) -> None:
    """Which takes 8 bits by itself, unless the configuration says otherwise, and fetches nothing but the page's own
    files."""
    picture = resize_longest_side(generate_scene(np.random.default_rng(0), 800)[0], SIZE)
    Image.fromarray(picture).save(npm / "scene.png")
    (npm / "index.html").write_text(PAGE)
    shutil.copytree(folder, npm / "models" / folder.name, dirs_exist_ok=True)
    predictor = SamPredictor(build_student_sam(small_student(), toy()))
    predictor.set_image(picture)
    with served(npm) as server, browsing(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{server.server_port}/index.html")
        browser.wait_for("!!window.masks")
        for options, least in (({"dtype": "fp32"}, 0.999), ({}, DTYPES["q8"])):
            ious = []
            for prompt in prompts_on(*picture.shape[:2]):
                asked = ", ".join(map(json.dumps, ("scene.png", prompt, options)))
                answer = browser.evaluate(f"masks({asked})")
                found = np.array(list(answer["bits"])).reshape(answer["dims"]) == "1"
                expected = predicted(predictor, prompt)[0]
                assert found.shape == expected.shape
                ious += map(mask_iou, np.concatenate(found), np.concatenate(expected))
            assert fmean(ious) >= least, (options, ious)
        config = json.loads((folder / "config.json").read_text()).get("transformers.js_config", {})
        instead = config.get("device_config", {}).get("wasm", {}).get("dtype", {})
        for kind in ("vision_encoder", "prompt_encoder_mask_decoder"):
            asked = any(f"{kind}_quantized" in path for path in server.asked)
            assert asked == (instead.get(kind, "q8") == "q8"), (kind, instead)
