from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from distill.evaluate.contestants import Contestant, load_contestant, needs_decoder
from distill.evaluate.decoding import Segmenter
from distill.recipe import load_recipe
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.teacher import load_teacher
from students import (
    InputError,
    create_student,
    load_checkpoint,
    load_student,
    save_published,
    save_student,
    untrained_sam,
)

RECIPE = ("recipe=quickstart", "image_size=128")


def predicted(predictor: SamPredictor, image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """What segment-anything's own predictor makes of a box: low-resolution logits."""
    predictor.set_image(image)
    return predictor.predict(box=box, multimask_output=False)[2]


def test_a_student_of_ours_works_in_the_teachers_decoder(student: Path) -> None:
    teacher = load_teacher("toy", None, 128)
    sam = load_contestant(Contestant("ours", student), teacher)
    assert needs_decoder(student)
    assert sam.mask_decoder is teacher.mask_decoder
    image, _ = generate_scene(np.random.default_rng(0), longest_side=160)
    box = np.array([20.0, 30.0, 90.0, 110.0])
    seen = Segmenter(sam, torch.device("cpu")).look(image)
    [(low_res, _)] = seen.decode(boxes=box[None])
    assert np.allclose(low_res[0].numpy(), predicted(SamPredictor(sam), image, box), atol=1e-3)
    assert seen.original_size == image.shape[:2]
    assert load_contestant(Contestant("teacher", None), teacher) is teacher


def test_a_published_student_brings_its_decoder_and_size(tmp_path: Path, seeded: None) -> None:
    path = tmp_path / "mobile_sam.pt"
    with torch.random.fork_rng(devices=[]):
        save_published(path, create_student("tiny_vit_5m"), untrained_sam(torch.nn.Identity()))
    assert not needs_decoder(path)
    sam = load_contestant(Contestant("import", path), None)
    assert not Contestant("import", path).in_decoder()
    image, _ = generate_scene(np.random.default_rng(0), longest_side=160)
    box = np.array([20.0, 30.0, 90.0, 110.0])
    seen = Segmenter(sam, torch.device("cpu")).look(image)
    assert seen.embedding.shape == (1, 256, 64, 64)
    [(low_res, _)] = seen.decode(boxes=box[None])
    expected = predicted(SamPredictor(load_checkpoint(path)), image, box)
    assert np.abs(low_res[0].numpy() - expected).max() < 1e-3 * np.abs(expected).max()


def test_one_that_does_not_fit_the_decoder_is_named(student: Path, tmp_path: Path) -> None:
    path = tmp_path / "larger.safetensors"
    save_student(path, create_student("repvit_m1", 192, 128), {})
    with pytest.raises(
        InputError, match=r"larger\.safetensors does not fit the teacher's decoder: the encoder works at 192 px"
    ):
        load_contestant(Contestant("larger", path), load_teacher("toy", None, 128))
    assert load_student(student).img_size == 128


def test_what_results_depend_on(student: Path, tmp_path: Path) -> None:
    recipe = load_recipe([*RECIPE])
    ours = Contestant("ours", student).inputs(recipe)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(student.read_bytes())
    assert Contestant("copy", copy).inputs(recipe) == ours
    save_student(copy, load_student(student), {"trained": "again"})
    assert Contestant("copy", copy).inputs(recipe) != ours
    assert Contestant("teacher", None).inputs(recipe)["dtype"] == "float32"  # as the students, on any device
    half = load_recipe([*RECIPE, "teacher.dtype=bfloat16"])
    assert Contestant("teacher", None).inputs(half)["dtype"] == "bfloat16"
    assert Contestant("ours", student).dtype(half) == "float32"
