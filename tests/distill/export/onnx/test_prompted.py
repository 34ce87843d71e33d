"""SAM as transformers cuts it for ONNX: what comes out is `SamPredictor`'s, whatever a call looks like."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from segment_anything import SamPredictor

from distill.export.encoder import RgbEncoder
from distill.export.onnx import (
    encoder_model,
    export_prompt_decoder,
    export_vision_encoder,
    in_float16,
    prompt_model,
    prompt_model_in,
    vision_model,
)
from distill.export.onnx.file import open_session
from distill.export.onnx.vision import normalized_encode
from distill.export.prompts import place_embedding
from distill.export.proof import ParityError, Reference
from exports import reference_of, small_student, toy

Answer = tuple[np.ndarray, np.ndarray]


@cache
def exported() -> onnx.ModelProto:
    """A small student's decoder; not to be changed."""
    return prompt_model(toy())


@cache
def decoder() -> onnxruntime.InferenceSession:
    return open_session(prompt_model_in("float32", exported()).SerializeToString())


@cache
def positions() -> np.ndarray:
    return toy().prompt_encoder.get_dense_pe().numpy()


def ask(points: list, labels: list, images: int = 1) -> Answer:
    """Predicted IoUs (B, P, 3) and logits (B, P, 3, 4h, 4w) of prompts on the first images of the reference."""
    found = decoder().run(
        ["iou_scores", "pred_masks"],
        {
            "input_points": np.array(points, np.float32),
            "input_labels": np.array(labels, np.int64),
            "image_embeddings": np.concatenate(reference_of().embeddings[:images]),
            "image_positional_embeddings": np.repeat(positions(), images, axis=0),
        },
    )
    return found[0], found[1]


def agree(found: Answer, expected: Answer, image: int = 0, prompt: int = 0, other: tuple[int, int] = (0, 0)) -> None:
    for one, another in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[image, prompt], another[other], rtol=0, atol=1e-4)


def predicted(image: int, points: list, labels: list, box: list | None = None) -> Answer:
    """What `SamPredictor` makes of it, in pixels of the resized image."""
    reference = reference_of()
    predictor = SamPredictor(toy())
    place_embedding(predictor, reference.embeddings[image], reference.rows[image])
    height, width = reference.rows[image].original_size
    scale = np.array([width, height]) / np.array(reference.rows[image].input_size)[::-1]
    given = {} if not points else {"point_coords": np.array(points) * scale, "point_labels": np.array(labels)}
    if box is not None:
        given["box"] = np.array(box) * np.tile(scale, 2)
    _, ious, low_res = predictor.predict(**given, multimask_output=True)
    return ious[None, None], low_res[None, None]


def test_clicks_get_the_end_that_sam_was_trained_with() -> None:
    alone = ask([[[[50, 40]]]], [[[1]]])
    agree(alone, predicted(0, [[50, 40]], [1]))
    agree(alone, ask([[[[50, 40], [0, 0]]]], [[[1, -1]]]))
    two = ask([[[[50, 40], [9, 70]]]], [[[1, 0]]])
    agree(two, predicted(0, [[50, 40], [9, 70]], [1, 0]))


def test_a_box_is_two_points_and_gets_no_end() -> None:
    agree(ask([[[[20, 20], [90, 70]]]], [[[2, 3]]]), predicted(0, [], [], [20, 20, 90, 70]))
    both = ask([[[[50, 40], [20, 20], [90, 70]]]], [[[1, 2, 3]]])
    agree(both, predicted(0, [[50, 40]], [1], [20, 20, 90, 70]))


def test_prompts_and_images_of_a_call_do_not_see_each_other() -> None:
    points = np.random.default_rng(0).uniform(5, 90, (2, 3, 2, 2))
    labels = [[[1, 0], [1, 1], [0, 1]]] * 2
    together = ask(points.tolist(), labels, images=2)
    assert together[1].shape == (2, 3, 3, 32, 32)
    for image in range(2):
        for prompt in range(3):
            expected = predicted(image, points[image, prompt].tolist(), labels[image][prompt])
            agree(together, expected, image, prompt)


def test_prompts_of_a_call_need_not_be_alike() -> None:
    """What fills one up, -1 or transformers' own -10, is not there, wherever it points."""
    mixed = ask([[[[20, 20], [90, 70]], [[50, 40], [0, 0]], [[77, 3], [50, 40]]]], [[[2, 3], [1, -1], [-10, 1]]])
    agree(mixed, predicted(0, [], [], [20, 20, 90, 70]))
    for prompt in (1, 2):
        agree(mixed, predicted(0, [[50, 40]], [1]), prompt=prompt)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_every_precision_is_proven(precision: str, tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    told = export_prompt_decoder(prompt_model_in(precision, exported()), reference_of(), path, precision)
    assert told["parity"]["mask_miou"] > 0.98
    assert set(told["inputs"]) == {
        "input_points", "input_labels", "image_embeddings", "image_positional_embeddings"
    }  # fmt: skip
    assert told["inputs"]["input_labels"]["dtype"] == "int64"
    assert told["outputs"]["pred_masks"]["shape"] == ["num_images", "num_prompts", 3, 32, 32]
    whole = len(prompt_model_in("float32", exported()).SerializeToString())
    assert path.stat().st_size < whole * {"float32": 1.01, "float16": 0.6, "int8": 0.4}[precision]


def test_a_decoder_of_other_weights_is_not_kept(tmp_path: Path) -> None:
    model = prompt_model_in("float32", exported())
    name = "prompt_encoder.point_embeddings.1.weight"
    token = next(each for each in model.graph.initializer if each.name == name)
    token.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(token), name))
    with pytest.raises(ParityError, match=r"decoder\.onnx differs from PyTorch"):
        export_prompt_decoder(model, reference_of(), tmp_path / "decoder.onnx")
    assert not list(tmp_path.iterdir())


@cache
def encoder() -> onnx.ModelProto:
    """Of any number of images; not to be changed."""
    return encoder_model(RgbEncoder(small_student()).eval(), dynamic_batch=True)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_vision_encoder_takes_what_the_processor_makes(precision: str, tmp_path: Path) -> None:
    model = in_float16(encoder()) if precision == "float16" else encoder()
    path = tmp_path / "vision.onnx"
    told = export_vision_encoder(vision_model(model, toy()), reference_of(), path, precision)
    assert told["inputs"]["pixel_values"]["shape"] == ["N", 3, 128, 128]
    session = open_session(path)
    images = np.random.default_rng(0).normal(size=(2, 3, 128, 128)).astype(np.float32)
    embedding, places = session.run(["image_embeddings", "image_positional_embeddings"], {"pixel_values": images})
    assert embedding.shape == places.shape == (2, 128, 8, 8)
    np.testing.assert_array_equal(places, np.repeat(positions(), 2, axis=0))


def test_the_padding_stays_nothing_in_float16() -> None:
    """It is the mean colour within, which float16 does not have exactly: what is left must not depend on that."""
    session = open_session(vision_model(in_float16(encoder()), toy()).SerializeToString())
    reference: Reference = reference_of()
    assert reference.relative_error(normalized_encode(session)) < 5e-3
