"""Masks over HTTP are those that `SamPredictor` makes of the student in PyTorch, in whatever form."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator

from distill.evaluate.ious import mask_iou
from distill.serve.engines import TorchEngine
from distill.serve.polygons import outlines, simplified
from exports import SIZE
from serving import Client, in_base64, predictor_of, predictor_sam, running, scene

SIZES = {"landscape": (150, 190), "portrait": (210, 130), "small": (40, 50), "large": (600, 900)}
"""Height and width."""


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with running() as found:
        yield found


def decoded(mask: dict[str, Any]) -> np.ndarray:
    return coco_mask.decode(mask["rle"]).astype(bool)


def prompts(height: int, width: int) -> dict[str, dict[str, Any]]:
    """As `SamPredictor` takes them."""
    scale = np.array([width, height])
    points = np.array([(0.42, 0.55), (0.8, 0.2), (0.3, 0.3)]) * scale
    box = np.array([0.2, 0.15, 0.7, 0.8]) * np.tile(scale, 2)
    return {
        "a click": {"point_coords": points[:1], "point_labels": np.array([1])},
        "two clicks": {"point_coords": points[:2], "point_labels": np.array([1, 0])},
        "three clicks": {"point_coords": points, "point_labels": np.array([1, 0, 1])},
        "a box": {"box": box},
        "a box and a click": {"box": box, "point_coords": points[:1], "point_labels": np.array([1])},
    }


def as_asked(prompt: dict[str, Any]) -> dict[str, Any]:
    names = {"point_coords": "points", "point_labels": "labels", "box": "box"}
    return {names[key]: value.tolist() for key, value in prompt.items() if key in names}


def expected(predictor: Any, prompt: dict[str, Any]) -> tuple[np.ndarray, float, np.ndarray]:
    """One click: the best of three; else the first. With the logits that correct it."""
    ambiguous = "box" not in prompt and len(prompt["point_coords"]) == 1
    masks, ious, low_res = predictor.predict(**prompt, multimask_output=ambiguous)
    best = int(ious.argmax())
    return masks[best], float(ious[best]), low_res[best]


@pytest.mark.parametrize("size", SIZES)
def test_masks_are_sam_predictors(client: Client, size: str) -> None:
    file = scene(1, SIZES[size])
    predictor, asked = predictor_of(file), prompts(*SIZES[size])
    id = client.embed(file)
    answers = client.masks(id=id, prompts=[as_asked(prompt) for prompt in asked.values()])
    for (name, prompt), (answer,) in zip(asked.items(), answers, strict=True):
        mask, iou, _ = expected(predictor, prompt)
        assert mask_iou(decoded(answer), mask) > 0.995, name
        assert answer["predicted_iou"] == pytest.approx(iou, abs=1e-3)
        assert answer["area"] == decoded(answer).sum()
    assert any(answer[0]["area"] > 100 for answer in answers), "masks that prove nothing"


def test_with_multimask_three_masks_come(client: Client) -> None:
    file = scene(1)
    prompt = prompts(150, 190)["a click"]
    (answers,) = client.masks(image=in_base64(file), prompts=[as_asked(prompt)], multimask=True)
    masks, ious, _ = predictor_of(file).predict(**prompt, multimask_output=True)
    assert [answer["predicted_iou"] for answer in answers] == pytest.approx(ious.tolist(), abs=1e-3)
    assert min(mask_iou(decoded(answer), mask) for answer, mask in zip(answers, masks, strict=True)) > 0.995


def test_an_earlier_mask_is_corrected(client: Client) -> None:
    file = scene(2)
    predictor, asked = predictor_of(file), prompts(150, 190)
    id = client.embed(file)
    ((first,),) = client.masks(id=id, prompts=[as_asked(asked["a click"])], low_res=True)
    _, _, low_res = expected(predictor, asked["a click"])
    kept = np.frombuffer(base64.b64decode(first["low_res"]), "<f4").reshape(SIZE // 4, SIZE // 4)
    assert np.abs(kept - low_res).max() < 1e-3
    corrected = {**as_asked(asked["two clicks"]), "mask_input": first["low_res"]}
    plain = as_asked(asked["two clicks"])
    (with_mask,), (without,) = client.masks(id=id, prompts=[corrected, plain])
    mask, iou, _ = expected(predictor, {**asked["two clicks"], "mask_input": low_res[None]})
    assert mask_iou(decoded(with_mask), mask) > 0.995
    assert with_mask["predicted_iou"] == pytest.approx(iou, abs=1e-3)
    assert with_mask["predicted_iou"] != pytest.approx(without["predicted_iou"], abs=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_the_three_formats_say_the_same(client: Client, size: str) -> None:
    height, width = SIZES[size]
    request = {"id": client.embed(scene(1, (height, width))), "prompts": [as_asked(prompts(height, width)["a box"])]}
    made = {kind: client.masks(**request, format=kind)[0][0] for kind in ("rle", "png", "polygons")}
    mask = decoded(made["rle"])
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(made["png"]["png"]))))
    assert picture.dtype == np.uint8
    assert (picture == mask * 255).all()
    drawn = rasterised(made["polygons"]["polygons"], height, width)
    assert mask_iou(drawn, mask) > 1 - 3 / np.sqrt(mask.sum())
    boxes = [each["bbox"] for each in made.values()]
    assert boxes[0] == boxes[1] == boxes[2] == coco_mask.toBbox(made["rle"]["rle"]).tolist()


def rasterised(polygons: list[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """As pycocotools draws them; what lies in a hole is not the object's."""

    def drawn(ring: list[float]) -> np.ndarray:
        return coco_mask.decode(coco_mask.frPyObjects([ring], height, width))[..., 0].astype(bool)

    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        part = drawn(polygon["outer"])
        for hole in polygon["holes"]:
            part &= ~drawn(hole)
        mask |= part
    return mask


def test_outlines_have_holes_and_end_at_the_border() -> None:
    mask = np.zeros((60, 80), bool)
    mask[:40, :50] = True
    mask[10:20, 10:25] = False
    mask[50:, 70:] = True
    found = outlines(mask - np.float32(0.5), 0.0)
    assert len(found) == 2
    assert sorted(len(holes) for _, holes in found) == [0, 1]
    polygons = [
        {"outer": outer.ravel().tolist(), "holes": [h.ravel().tolist() for h in holes]} for outer, holes in found
    ]
    assert mask_iou(rasterised(polygons, 60, 80), mask) > 0.99
    assert min(outer.min() for outer, _ in found) == 0.0
    assert not outlines(np.full((5, 5), -1.0, np.float32), 0.5)


def test_a_ring_is_simplified_within_the_tolerance() -> None:
    turn = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    ring = 100 + 80 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    fewer = simplified(ring, 0.5)
    assert 10 < len(fewer) < 100
    edges = np.concatenate([fewer, fewer[:1]])
    along = np.linspace(edges[:-1], edges[1:], 50).reshape(-1, 2)
    assert np.abs(np.hypot(*(along - 100).T) - 80).max() <= 0.5


def test_everything_is_the_mask_generators(client: Client) -> None:
    file = scene(3)
    settings = {"points_per_side": 6, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.5}
    status, answer = client.post("/v1/everything", {"image": in_base64(file), **settings})
    assert status == 200, answer
    image = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    records = SamAutomaticMaskGenerator(predictor_sam(), **settings).generate(image)
    assert len(records) > 2, "masks that prove nothing"
    assert len(answer["masks"]) == len(records)
    for found, record in zip(answer["masks"], records, strict=True):
        assert mask_iou(decoded(found), record["segmentation"]) > 0.99
        assert found["predicted_iou"] == pytest.approx(record["predicted_iou"], abs=1e-3)
        assert found["bbox"] == pytest.approx([*record["bbox"][:2], *(side + 1 for side in record["bbox"][2:])], abs=1)
        assert found["point_coords"] == pytest.approx(np.array(record["point_coords"]))


def test_pytorch_serves_the_same_masks() -> None:
    file = scene(1)
    predictor = predictor_of(file)
    with running(engine_at_work=TorchEngine(predictor_sam(), torch.device("cpu"), 4)) as client:
        for name, prompt in prompts(150, 190).items():
            ((answer,),) = client.masks(image=in_base64(file), prompts=[as_asked(prompt)])
            mask, iou, _ = expected(predictor, prompt)
            assert mask_iou(decoded(answer), mask) > 0.995, name
            assert answer["predicted_iou"] == pytest.approx(iou, abs=1e-3)


def test_a_turned_photograph_is_upright(client: Client) -> None:
    upright = Image.open(io.BytesIO(scene(1, (150, 190))))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn it by 90°
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    status, answer = client.post("/v1/embed", {"image": in_base64(file.getvalue())})
    assert (status, answer["width"], answer["height"]) == (200, 190, 150)
    asked = [as_asked(prompts(150, 190)["a box"])]
    turned = client.masks(id=answer["id"], prompts=asked)
    assert turned == client.masks(image=in_base64(scene(1, (150, 190))), prompts=asked)
