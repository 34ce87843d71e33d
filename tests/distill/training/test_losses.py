"""Losses against their formulas in NumPy, and the mask loss against calls of segment-anything's own decoder."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

from distill.losses import Objective, embedding_errors
from distill.training.mask_loss import MaskLoss, corrections, mask_distance, pixels_inside
from distill.training.prompts import MaskPrompts, sample_prompts
from embeddings_cache.images.annotations import decode_masks
from embeddings_cache.shards.codec import CacheRow
from embeddings_cache.shards.reader import EmbeddingsCache
from embeddings_cache.teacher.loading import load_teacher

SIZE = 128


@pytest.fixture(scope="module")
def decoder() -> Sam:
    return load_teacher("toy", None, SIZE)


@pytest.fixture(scope="module")
def rows(finished_run: Path) -> list[CacheRow]:
    cache = EmbeddingsCache(finished_run / "cache")
    return [cache[index] for index in (0, 5, 9)]


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 8, 4, 4, generator=generator, dtype=torch.float64)
    return student, teacher


def stacked(rows: list[CacheRow]) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = torch.stack([torch.from_numpy(row.embedding).float() for row in rows])
    return embeddings, torch.tensor([row.input_size for row in rows])


def drawn(rows: list[CacheRow], count: int, rounds: int, seed: int = 0) -> MaskPrompts:
    return MaskPrompts.stack(
        [sample_prompts(row, count, rounds, np.random.default_rng([seed, n])) for n, row in enumerate(rows)]
    )


def test_embedding_losses_against_their_formulas(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = pair
    x, y = student.numpy(), teacher.numpy()
    cosines = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    size = torch.tensor([[64, 64], [40, 17]])
    terms = Objective(64)({"mse": 2.0, "cosine": 1.0}, student, teacher, size)
    assert terms["mse"].item() == pytest.approx(((x - y) ** 2).mean())
    assert terms["cosine"].item() == pytest.approx((1 - cosines).mean())
    assert set(Objective(64)({"mse": 1.0, "cosine": 0.0, "mask": 0.0}, student, teacher, size)) == {"mse"}
    mse, cosine = embedding_errors(student, teacher)
    np.testing.assert_allclose(mse, ((x - y) ** 2).mean((1, 2, 3)))
    np.testing.assert_allclose(cosine, cosines.mean((1, 2)))


def test_cells_that_only_cover_padding_carry_no_weight(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = pair
    size = torch.tensor([[64, 33], [16, 64]])  # of cells of 16 px: 4 × 3, the third column by one pixel; 1 × 4
    errors = ((student - teacher) ** 2).numpy()
    expected = (errors[0, :, :, :3].mean() + errors[1, :, :1].mean()) / 2
    objective = Objective(64, ignore_padding=True)
    assert objective({"mse": 1.0}, student, teacher, size)["mse"].item() == pytest.approx(expected)
    student.requires_grad_()
    objective({"mse": 1.0, "cosine": 1.0}, student, teacher, size)["cosine"].backward()
    assert student.grad is not None
    assert not student.grad[0, :, :, 3].any()
    assert not student.grad[1, :, 1:].any()
    assert student.grad[0, :, 3, 2].any()


def test_mask_distance_against_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = 3 * torch.randn(2, 3, 6, 5, generator=generator, dtype=torch.float64)
    inside = torch.zeros(6, 5, dtype=torch.bool)
    inside[:4, :3] = True
    p, q = (1 / (1 + np.exp(-logits.numpy()[:, :4, :3])) for logits in (a, b))
    entropy = -(q * np.log(q) + (1 - q) * np.log(1 - q)).mean((1, 2))
    cross = -(q * np.log(p) + (1 - q) * np.log(1 - p)).mean((1, 2)) - entropy
    dice = 1 - 2 * (p * q).sum((1, 2)) / (p**2 + q**2).sum((1, 2))
    np.testing.assert_allclose(mask_distance(a, b, inside), cross + dice, rtol=1e-3)
    for empty_or_full in (-30.0, 30.0):
        same = torch.full((2, 6, 5), empty_or_full)
        np.testing.assert_allclose(mask_distance(same, same, inside), 0, atol=1e-6)
    np.testing.assert_allclose(mask_distance(b, b, inside), 0, atol=1e-12)
    b.requires_grad_()
    (gradient,) = torch.autograd.grad(mask_distance(b, b.detach(), inside).sum(), b)
    assert gradient.abs().max() < 1e-12  # equal masks are the minimum


def by_the_decoders_own_calls(
    decoder: Sam, student: torch.Tensor, teacher: torch.Tensor, size: torch.Tensor, prompts: MaskPrompts
) -> float:
    """The loss of one round without corrections, an image and a prompt at a time, as `SamPredictor` asks."""
    total = []
    pe = decoder.prompt_encoder.get_dense_pe()
    inside = pixels_inside(size, SIZE, SIZE // 4)
    for image in range(len(student)):
        asked = [(((point[None, None], torch.ones(1, 1)), None), True) for point in prompts.points[image]]
        asked += [((None, box[None]), False) for box in prompts.boxes[image]]
        for (points, box), multimask in asked:
            sparse, dense = decoder.prompt_encoder(points, box, None)
            ours, theirs = (
                decoder.mask_decoder(embedding[image : image + 1], pe, sparse, dense, multimask)[0][0]
                for embedding in (student, teacher)
            )
            total.append(mask_distance(ours, theirs, inside[image]).mean())
    return torch.stack(total).mean().item()


def test_the_mask_loss_is_what_the_decoders_own_calls_make(decoder: Sam, rows: list[CacheRow]) -> None:
    teacher, size = stacked(rows)
    student = teacher + 0.3 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    loss = MaskLoss(decoder)
    for count in (1, 5):
        prompts = drawn(rows, count, rounds=0)
        with torch.no_grad():
            expected = by_the_decoders_own_calls(decoder, student, teacher, size, prompts)
        assert loss(student, teacher, size, prompts).item() == pytest.approx(expected, rel=1e-4)
        assert expected > 0.01


def test_descending_the_mask_loss_brings_the_masks_together(decoder: Sam, rows: list[CacheRow]) -> None:
    teacher, size = stacked(rows)
    student = (teacher + 0.5 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    loss, prompts = MaskLoss(decoder), drawn(rows, 4, rounds=1)
    assert loss(teacher, teacher, size, prompts).item() == pytest.approx(0, abs=1e-6)
    optimizer = torch.optim.Adam([student], lr=0.03)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(student, teacher, size, prompts)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(parameter.grad is None for parameter in decoder.parameters())  # only the student learns


def test_corrections_lie_where_masks_disagree_and_say_what_is_right() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (torch.from_numpy(rng.random((2, 500, 6, 8)) < 0.5) for _ in range(2))
    inside = torch.zeros(2, 1, 6, 8, dtype=torch.bool)
    inside[:, :, :4] = True
    theirs[0, 0] = ours[0, 0]
    draws = torch.from_numpy(rng.random((2, 500)).astype(np.float32))
    where, labels = corrections(ours, theirs, inside, draws)
    assert labels[0, 0] == -1
    for image in range(2):
        for prompt in range(1 - image, 500):
            x, y = where[image, prompt].int().tolist()
            assert ours[image, prompt, y, x] != theirs[image, prompt, y, x]
            assert y < 4
            assert labels[image, prompt] == theirs[image, prompt, y, x]
    # evenly: one and the same disagreement of 4 pixels is met everywhere
    ours, theirs = torch.zeros(1, 400, 6, 8, dtype=torch.bool), torch.zeros(1, 400, 6, 8, dtype=torch.bool)
    theirs[:, :, 1, 2:6] = True
    where, _ = corrections(ours, theirs, inside[:1], draws[:1, :400])
    counts = np.bincount(where[0, :, 0].int().numpy(), minlength=8)
    assert counts[2:6].min() > 60
    assert counts.sum() == counts[2:6].sum()


def test_prompts_follow_the_annotation(rows: list[CacheRow]) -> None:
    row = rows[0]
    scale = np.array(row.input_size[::-1]) / np.array(row.original_size[::-1])
    masks = list(decode_masks(row.annotation or ""))
    boxes = [
        np.array([*np.argwhere(m).min(0)[::-1], *(np.argwhere(m).max(0)[::-1] + 1)]) * np.tile(scale, 2) for m in masks
    ]
    for seed in range(20):
        prompts = sample_prompts(row, 5, 2, np.random.default_rng(seed))
        assert (prompts.points.shape, prompts.boxes.shape, prompts.draws.shape) == ((3, 2), (2, 4), (5, 2))
        for x, y in prompts.points.numpy() / scale:  # as `SamPredictor` takes points: numbers of pixels
            assert any(mask[round(float(y)), round(float(x))] for mask in masks)
            assert (x, y) == pytest.approx((round(float(x)), round(float(y))), abs=1e-3)
        for box in prompts.boxes.numpy():
            # the noise has a standard deviation of a tenth of the side; 5 of them are 0.5
            near = [np.abs(box - b) <= 0.5 * np.tile(b[2:] - b[:2], 2) + 1 for b in boxes]
            assert any(side.all() for side in near)
            assert (box >= 0).all()
            assert (box[2:] <= row.input_size[::-1]).all()
        assert (prompts.draws < 1).all()


def test_prompts_are_a_function_of_the_generator(rows: list[CacheRow]) -> None:
    first, again, other = (drawn(rows, 4, 1, seed) for seed in (0, 0, 1))
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in vars(first))
    assert not torch.equal(first.points, other.points)


def test_an_image_without_masks_is_asked_somewhere(rows: list[CacheRow]) -> None:
    for annotation in (None, json.dumps({"annotations": []})):
        prompts = sample_prompts(replace(rows[0], annotation=annotation), 6, 1, np.random.default_rng(0))
        height, width = rows[0].input_size
        assert (prompts.points <= torch.tensor([width, height])).all()
        assert (prompts.boxes[:, :2] <= prompts.boxes[:, 2:]).all()
        assert len(torch.unique(prompts.points)) == 6


def test_an_annotation_that_cannot_be_decoded_is_named_and_does_not_end_a_run(rows: list[CacheRow]) -> None:
    broken = json.dumps({"annotations": [{"segmentation": {"size": [4, 4], "counts": 5}}]})
    with pytest.warns(UserWarning, match=f"the annotation of {rows[0].key} cannot be decoded"):
        prompts = sample_prompts(replace(rows[0], annotation=broken), 2, 1, np.random.default_rng(0))
    assert torch.isfinite(prompts.points).all()
