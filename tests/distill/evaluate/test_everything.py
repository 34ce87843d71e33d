import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator

from distill.evaluate import everything as module
from distill.evaluate.decoding import Segmenter
from distill.evaluate.everything import BoundedMaskGenerator, everything
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.teacher.loading import load_teacher
from students import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "masks"),
    [
        ({}, range(2, 100)),
        ({"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "points_per_side": 6}, range(10, 1000)),
        ({"crop_n_layers": 1, "points_per_side": 8}, range(2, 100)),
        ({"pred_iou_thresh": 1.5}, range(1)),
    ],
)
def test_everything_is_what_segment_anything_finds(
    settings: dict[str, float], masks: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, however few masks are enlarged at once."""
    image, sam = generate_scene(np.random.default_rng(5), 300)[0], load_teacher("toy", None, 256)
    options = {"points_per_side": 12, "output_mode": "coco_rle", **settings}
    expected = SamAutomaticMaskGenerator(sam, **options).generate(image)
    assert len(expected) in masks
    assert BoundedMaskGenerator(sam, **options).generate(image) == expected
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", 1)
    assert BoundedMaskGenerator(sam, **options).generate(image) == expected


LOOSE = {"points_per_side": 6, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.5}
"""With the defaults the toy finds next to nothing at 128 px."""


@pytest.mark.parametrize("crops", [{}, {"crop_n_layers": 1}])
def test_a_segmenter_finds_the_same(crops: dict[str, int]) -> None:
    settings = {**LOOSE, **crops}
    image, sam = generate_scene(np.random.default_rng(2), 160)[0], load_teacher("toy", None, 128)
    expected = SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **settings).generate(image)
    assert len(expected) > 3
    assert everything(Segmenter(sam, CPU), image, **settings) == expected
    ious = [mask["predicted_iou"] for mask in expected]
    assert crops or ious == sorted(ious, reverse=True)


def test_the_segmenters_precision_is_the_encoders() -> None:
    """An encoder at bfloat16 does not even take the pixels that segment-anything's own predictor gives it."""
    image, sam = generate_scene(np.random.default_rng(2), 160)[0], load_teacher("toy", None, 128)
    exact = everything(Segmenter(sam, CPU), image, **LOOSE)
    rough = everything(Segmenter(sam, CPU, "bfloat16"), image, **LOOSE)
    with pytest.raises(RuntimeError, match="type"):
        BoundedMaskGenerator(sam, **LOOSE).generate(image)
    assert len(rough) > 3
    assert [mask["predicted_iou"] for mask in rough] != [mask["predicted_iou"] for mask in exact]


def test_too_elongated_a_photograph_is_refused() -> None:
    with pytest.raises(InputError, match="2000×1 px is too elongated"):
        everything(Segmenter(load_teacher("toy", None, 128), CPU), np.zeros((1, 2000, 3), np.uint8))
