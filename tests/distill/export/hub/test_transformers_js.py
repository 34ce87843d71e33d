"""The folder for transformers.js, and its files in onnxruntime without anything of ours."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from segment_anything import SamPredictor

from distill.export.encoder import RgbEncoder
from distill.export.files import digest
from distill.export.hub import export_transformers_js
from distill.export.hub.transformers_js import _config
from distill.export.onnx import encoder_model, marked
from distill.export.onnx.file import open_session
from distill.export.onnx.vision import normalized_encode
from distill.export.prompts import place_embedding
from distill.export.subject import Subject
from distill.run import is_whole
from distill.schema import NEWEST_OPSET
from exports import reference_of, scene_row, small_student, toy
from students import InputError, build_student_sam

FILES = [
    f"onnx/{kind}{end}.onnx"
    for end in ("", "_fp16", "_quantized")
    for kind in ("vision_encoder", "prompt_encoder_mask_decoder")
]


@cache
def subject() -> Subject:
    student = small_student()
    sam = build_student_sam(student, toy())
    return Subject("repvit_m0_9", "toy", "quickstart", student, student, sam, None)


def encoder() -> onnx.ModelProto:
    model = encoder_model(RgbEncoder(small_student()).eval(), dynamic_batch=True, opset=NEWEST_OPSET)
    return marked(model, subject().marks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One for a small student, and what the manifest says of it."""
    path = tmp_path_factory.mktemp("export") / "transformers_js"
    pictures = [scene_row(seed).pixels() for seed in range(4, 8)]
    return path, export_transformers_js(path, subject(), reference_of(), encoder, pictures, 17, reference_of)


def test_all_is_there_that_transformers_js_looks_for(folder: tuple[Path, dict[str, Any]]) -> None:
    path, told = folder
    assert list(told["files"]) == [name for name in FILES if name not in told["left_out"]]
    assert set(told["files"]) >= set(FILES[:4])
    assert is_whole(path, told)
    assert {"config.json", "preprocessor_config.json", "README.md"} <= set(told["contents"])
    assert all(digest(path / name) == entry["sha256"] for name, entry in told["files"].items())
    processor = json.loads((path / "preprocessor_config.json").read_text())
    assert processor["size"] == {"longest_edge": 128}
    assert processor["pad_size"] == {"height": 128, "width": 128}
    assert json.loads((path / "config.json").read_text())["model_type"] == "sam"
    card = (path / "README.md").read_text()
    assert all(f"`{name}`" in card for name in FILES)
    for file in told["files"]:
        model = onnx.load(path / file)
        assert {entry.key: entry.value for entry in model.metadata_props} == subject().marks
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]


def test_encoder_and_decoder_of_every_precision_go_together(folder: tuple[Path, dict[str, Any]]) -> None:
    path, told = folder
    reference = reference_of()
    row = reference.rows[0]
    predictor = SamPredictor(toy())
    place_embedding(predictor, reference.embeddings[0], row)
    scale = np.array(row.original_size) / np.array(row.input_size)
    click = {"point_coords": np.array([[40, 50]]) * scale[::-1], "point_labels": np.ones(1)}
    expected = predictor.predict(**click, multimask_output=True)[2]
    for end, most in (("", 1e-4), ("_fp16", 2e-2), ("_quantized", 0.3)):
        names = [f"onnx/{kind}{end}.onnx" for kind in ("vision_encoder", "prompt_encoder_mask_decoder")]
        if not set(names) <= set(told["files"]):
            continue
        vision, decoder = (open_session(path / name) for name in names)
        pixels = np.zeros((1, 3, 128, 128), np.float32)
        embedding = normalized_encode(vision)(row.pixels())
        places = vision.run(["image_positional_embeddings"], {"pixel_values": pixels})[0]
        point = np.array([[[[40, 50]]]], np.float32)
        feeds = {"input_points": point, "input_labels": np.array([[[1]]])}
        feeds |= {"image_embeddings": embedding, "image_positional_embeddings": places}
        found = decoder.run(["pred_masks"], feeds)[0][0, 0]
        assert np.linalg.norm(found - expected) <= most * np.linalg.norm(expected), end


def test_a_browser_takes_another_file_where_its_own_is_left_out() -> None:
    sam = subject().sam
    assert sam is not None
    without: dict[str, Any] = {name: {} for name in FILES if name != "onnx/vision_encoder_quantized.onnx"}
    told = _config(sam, subject(), without)["transformers.js_config"]["device_config"]["wasm"]["dtype"]
    assert told == {"vision_encoder": "fp32", "prompt_encoder_mask_decoder": "q8"}
    assert "transformers.js_config" not in _config(sam, subject(), {name: {} for name in FILES})
    slow = {name: {"times_as_fast": 0.9} if "vision" in name else {} for name in FILES}
    assert _config(sam, subject(), slow)["transformers.js_config"]["device_config"]["wasm"]["dtype"] == told


def test_one_size_for_pictures_and_prompts_is_all_that_it_knows(tmp_path: Path) -> None:
    whole = small_student()
    other = Subject("repvit_m0_9", "toy", "quickstart", whole.native(), whole, subject().sam, None)
    with pytest.raises(InputError, match=r"transformers_js goes with export\.input=sam"):
        export_transformers_js(tmp_path / "transformers_js", other, reference_of(), encoder, [], 17, reference_of)
    assert not list(tmp_path.iterdir())
