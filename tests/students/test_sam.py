import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.teacher.toy import load_toy_teacher
from students import build_student_sam, create_student

TINY = {"embed_dim": 128, "widths": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


@pytest.fixture
def scene() -> np.ndarray:
    return generate_scene(np.random.default_rng(5), 160)[0]


def test_student_serves_sam_predictor(scene: np.ndarray) -> None:
    teacher = load_toy_teacher(128)
    encoder = create_student("repvit_m0_9", 128, **TINY)
    sam = build_student_sam(encoder, teacher)
    assert not sam.training
    predictor = SamPredictor(sam)
    predictor.set_image(scene)
    assert predictor.get_image_embedding().shape == (1, 128, 8, 8)
    masks, iou, low_res = predictor.predict(np.array([[60, 50]]), np.array([1]), box=np.array([20, 20, 90, 90]))
    assert masks.shape == (3, *scene.shape[:2])
    assert iou.shape == (3,)
    again, _, _ = predictor.predict(box=np.array([20, 20, 90, 90]), mask_input=low_res[:1], multimask_output=False)
    assert again.shape == (1, *scene.shape[:2])


def test_decoder_is_the_teachers_own(scene: np.ndarray) -> None:
    """With the teacher's encoder in the student's place nothing changes."""
    teacher = load_toy_teacher(128)
    swapped = build_student_sam(teacher.image_encoder, teacher)
    answers = []
    for sam in (teacher, swapped):
        predictor = SamPredictor(sam)
        predictor.set_image(scene)
        answers.append(predictor.predict(np.array([[60, 50]]), np.array([1]), return_logits=True)[0])
    np.testing.assert_array_equal(*answers)


def test_student_serves_the_automatic_mask_generator(scene: np.ndarray) -> None:
    torch.manual_seed(0)
    sam = build_student_sam(create_student("repvit_m0_9", 128, **TINY), load_toy_teacher(128))
    generator = SamAutomaticMaskGenerator(
        sam, points_per_side=4, pred_iou_thresh=-10.0, stability_score_thresh=0.0, crop_n_layers=1
    )
    records = generator.generate(scene)
    assert records
    assert all(record["segmentation"].shape == scene.shape[:2] for record in records)


def test_what_does_not_fit_the_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="makes 32 channels, the decoder takes 128"):
        build_student_sam(create_student("repvit_m0_9", 128, **{**TINY, "embed_dim": 32}), load_toy_teacher(128))
    with pytest.raises(ValueError, match="192 px"):
        build_student_sam(create_student("repvit_m0_9", 192, **TINY), load_toy_teacher(128))
