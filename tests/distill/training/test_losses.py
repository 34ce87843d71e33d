"""Losses against their formulas in NumPy, and the mask loss against calls of segment-anything's own decoder."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything.modeling import Sam

from distill.losses import Objective, embedding_errors
from distill.schema import TrainRecipe
from distill.training.mask_loss import mask_distances, mask_loss
from distill.training.prompted import PromptedDecoder, disagreement, pixels_inside
from distill.training.prompts import MaskPrompts, covered_share, sample_prompts
from distill.training.truth_loss import clear_cells, focal_and_dice, truth_loss
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


def losses_of(**weights: float) -> TrainRecipe:
    return TrainRecipe(loss=weights)


def test_embedding_losses_against_their_formulas(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = pair
    x, y = student.numpy(), teacher.numpy()
    cosines = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    size = torch.tensor([[64, 64], [40, 17]])
    weights = {"mse": 2.0, "cosine": 1.0, "l1": 1.0, "huber": 1.0}
    terms = Objective(64)(TrainRecipe(loss=weights, huber_delta=0.7), student, teacher, size)
    assert terms["mse"].item() == pytest.approx(((x - y) ** 2).mean())
    far = np.abs(x - y)
    assert terms["l1"].item() == pytest.approx(far.mean())
    assert terms["huber"].item() == pytest.approx(np.where(far <= 0.7, far**2 / 2, 0.7 * (far - 0.35)).mean())
    assert 0.2 < (far <= 0.7).mean() < 0.8
    assert terms["cosine"].item() == pytest.approx((1 - cosines).mean())
    assert set(Objective(64)(losses_of(mse=1.0, cosine=0.0, mask=0.0), student, teacher, size)) == {"mse"}
    mse, cosine = embedding_errors(student, teacher)
    np.testing.assert_allclose(mse, ((x - y) ** 2).mean((1, 2, 3)))
    np.testing.assert_allclose(cosine, cosines.mean((1, 2)))


def test_cells_that_only_cover_padding_carry_no_weight(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = pair
    size = torch.tensor([[64, 33], [16, 64]])  # of cells of 16 px: 4 × 3, the third column by one pixel; 1 × 4
    errors = ((student - teacher) ** 2).numpy()
    expected = (errors[0, :, :, :3].mean() + errors[1, :, :1].mean()) / 2
    objective, settings = Objective(64), replace(losses_of(mse=1.0, cosine=1.0), ignore_padding=True)
    assert objective(settings, student, teacher, size)["mse"].item() == pytest.approx(expected)
    student.requires_grad_()
    objective(settings, student, teacher, size)["cosine"].backward()
    assert student.grad is not None
    assert not student.grad[0, :, :, 3].any()
    assert not student.grad[1, :, 1:].any()
    assert student.grad[0, :, 3, 2].any()


def test_mask_distances_against_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = 3 * torch.randn(2, 3, 6, 5, generator=generator, dtype=torch.float64)
    inside = torch.zeros(6, 5, dtype=torch.bool)
    inside[:4, :3] = True
    p, q = (1 / (1 + np.exp(-logits.numpy()[:, :4, :3])) for logits in (a, b))
    entropy = -(q * np.log(q) + (1 - q) * np.log(1 - q)).mean((1, 2))
    cross = -(q * np.log(p) + (1 - q) * np.log(1 - p)).mean((1, 2)) - entropy
    dice = 1 - 2 * (p * q).sum((1, 2)) / (p**2 + q**2).sum((1, 2))
    for found, expected in zip(mask_distances(a, b, inside), (cross, dice), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    for empty_or_full in (-30.0, 30.0):
        same = torch.full((2, 6, 5), empty_or_full)
        for targets in ("soft", "binary"):
            np.testing.assert_allclose(torch.stack(mask_distances(same, same, inside, targets)), 0, atol=1e-6)
    np.testing.assert_allclose(torch.stack(mask_distances(b, b, inside)), 0, atol=1e-12)
    b.requires_grad_()
    for distance in mask_distances(b, b.detach(), inside):
        (gradient,) = torch.autograd.grad(distance.sum(), b, retain_graph=True)
        assert gradient.abs().max() < 1e-12  # equal masks are the minimum


def test_binary_targets_are_what_is_more_than_half() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = 3 * torch.randn(2, 3, 6, 5, generator=generator, dtype=torch.float64)
    inside = torch.zeros(6, 5, dtype=torch.bool)
    inside[:4, :3] = True
    p, t = 1 / (1 + np.exp(-a.numpy()[:, :4, :3])), (b.numpy()[:, :4, :3] > 0).astype(float)
    cross = -(t * np.log(p) + (1 - t) * np.log(1 - p))
    overlap, sums = (p * t).sum((1, 2)), (p + t).sum((1, 2))
    a.requires_grad_()
    found = mask_distances(a, b, inside, "binary")
    np.testing.assert_allclose(found[0].detach(), cross.mean((1, 2)))
    np.testing.assert_allclose(found[1].detach(), 1 - (2 * overlap + 1) / (sums + 1))
    # By hand: of the cross entropy (p − t)/n, of dice by the quotient rule, both times p (1 − p) where p is a sigmoid.
    (gradient,) = torch.autograd.grad(found[0].sum(), a, retain_graph=True)
    np.testing.assert_allclose(gradient[:, :4, :3], (p - t) / 12)
    assert not gradient[:, 4:].any()
    (gradient,) = torch.autograd.grad(found[1].sum(), a)
    slope = ((2 * overlap + 1)[:, None, None] - 2 * t * (sums + 1)[:, None, None]) / (sums + 1)[:, None, None] ** 2
    np.testing.assert_allclose(gradient[:, :4, :3], slope * p * (1 - p))


def focal_and_dice_by_numpy(logits: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Written apart, class by class, for q that is 0 or 1; sums over all cells of (..., n)."""
    p = 1 / (1 + np.exp(-logits))
    focal = np.where(q == 1, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p))
    return 20 * focal.mean(-1) + 1 - (2 * (p * q).sum(-1) + 1) / (p.sum(-1) + q.sum(-1) + 1)


def test_focal_and_dice_against_numpy_with_their_gradient() -> None:
    rng = np.random.default_rng(0)
    logits, q = rng.normal(size=(3, 5, 4)), (rng.random((3, 5, 4)) < 0.4).astype(float)
    inside = torch.zeros(5, 4, dtype=torch.bool)
    inside[:3, :2] = True
    asked = torch.from_numpy(logits).requires_grad_()
    found = focal_and_dice(asked, torch.from_numpy(q), inside)

    def counted(values: np.ndarray) -> np.ndarray:
        return values[:, :3, :2].reshape(3, -1)

    np.testing.assert_allclose(found.detach(), focal_and_dice_by_numpy(counted(logits), counted(q)))
    (gradient,) = torch.autograd.grad(found.sum(), asked)
    assert not gradient[:, 3:].any()
    for place in ((0, 0, 0), (1, 2, 1), (2, 1, 0)):
        moved = [logits.copy(), logits.copy()]
        moved[0][place], moved[1][place] = logits[place] - 1e-5, logits[place] + 1e-5
        below, above = (focal_and_dice_by_numpy(counted(each), counted(q)).sum() for each in moved)
        assert gradient[place].item() == pytest.approx((above - below) / 2e-5, rel=1e-6)
    half = focal_and_dice(torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.5))
    assert half.item() == pytest.approx(20 * 0.5 * 0.25 * np.log(2) + 1 - (2 * 4 + 1) / (8 + 8 + 1))


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
            total.append(sum(mask_distances(ours, theirs, inside[image])).mean())
    return torch.stack(total).mean().item()


def test_the_mask_loss_is_what_the_decoders_own_calls_make(decoder: Sam, rows: list[CacheRow]) -> None:
    teacher, size = stacked(rows)
    student = teacher + 0.3 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    objective = Objective(SIZE, decoder)
    for count in (1, 5):
        prompts = drawn(rows, count, rounds=0)
        with torch.no_grad():
            expected = by_the_decoders_own_calls(decoder, student, teacher, size, prompts)
            found = objective(losses_of(mask=1, mask_bce=1, mask_dice=1), student, teacher, size, prompts)
        assert found["mask"].item() == pytest.approx(expected, rel=1e-4)
        assert found["mask"].item() == pytest.approx(found["mask_bce"].item() + found["mask_dice"].item())
        assert expected > 0.01


def test_descending_the_mask_loss_brings_the_masks_together(decoder: Sam, rows: list[CacheRow]) -> None:
    teacher, size = stacked(rows)
    student = (teacher + 0.5 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    loss, prompts = partial(mask_loss, PromptedDecoder(decoder)), drawn(rows, 4, rounds=1)
    assert sum(loss(teacher, teacher, size, prompts)).item() == pytest.approx(0, abs=1e-6)
    optimizer = torch.optim.Adam([student], lr=0.03)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = sum(loss(student, teacher, size, prompts))
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
    where, labels = disagreement(ours, theirs, inside, draws)
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
    where, _ = disagreement(ours, theirs, inside[:1], draws[:1, :400])
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


@pytest.mark.parametrize(("share", "points"), [(0.0, 0), (0.3, 2), (0.5, 3), (1.0, 5)])
def test_some_prompts_are_points_and_the_rest_boxes(
    share: float, points: int, rows: list[CacheRow], decoder: Sam
) -> None:
    teacher, size = stacked(rows)
    prompts = MaskPrompts.stack([sample_prompts(row, 5, 1, np.random.default_rng(0), share) for row in rows])
    assert (prompts.points.shape[1], prompts.boxes.shape[1]) == (points, 5 - points)
    with torch.no_grad():
        loss = Objective(SIZE, decoder)(losses_of(mask=1), teacher + 0.1, teacher, size, prompts)["mask"]
    assert 0 < loss < 2


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


@pytest.mark.parametrize("shape", [(96, 128), (128, 96), (37, 101), (640, 427)])
def test_a_true_mask_lies_on_the_grid_where_the_picture_does(shape: tuple[int, int]) -> None:
    """Against brute force: a thousand samples of every cell."""
    mask = np.random.default_rng(0).random((4, 5)) < 0.5
    mask = np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST))
    scale = 128 / max(shape)
    size = int(shape[0] * scale + 0.5), int(shape[1] * scale + 0.5)
    found = covered_share(mask, size, 128, 32)
    assert found.dtype == np.uint8
    fine = 32  # samples a cell and side
    y, x = ((np.arange(32 * fine) + 0.5) * (4 / fine) * shape[axis] / size[axis] for axis in (0, 1))
    padded = np.pad(mask, ((0, 4 * shape[0]), (0, 4 * shape[1])))
    sampled = padded[y.astype(int)][:, x.astype(int)].reshape(32, fine, 32, fine).mean((1, 3))
    np.testing.assert_allclose(found / 255, sampled, atol=0.05)
    assert found.any()


def test_a_click_does_not_call_a_thin_object_background() -> None:
    """A pole half a cell wide: it covers no cell by more than half."""
    mask = np.zeros((256, 256), dtype=bool)
    mask[:, 101:105] = True
    covered = torch.from_numpy(covered_share(mask, (256, 256), 256, 32)) / 255  # cells of 8 px
    in_mask, outside = clear_cells(covered)
    assert in_mask.sum() == 32
    assert (covered[in_mask] == 0.375).logical_or((covered[in_mask] - 0.375).abs() < 0.01).all()
    assert not (outside & (covered > 0)).any()
    mask[:, 64:128] = True
    in_mask, outside = clear_cells(torch.from_numpy(covered_share(mask, (256, 256), 256, 32)) / 255)
    assert (in_mask.sum(), outside.sum()) == (32 * 8, 32 * 24)


def truths_of(rows: list[CacheRow], count: int, rounds: int) -> MaskPrompts:
    generators = [np.random.default_rng([0, number]) for number in range(len(rows))]
    grid = (SIZE, SIZE // 4)
    pairs = zip(rows, generators, strict=True)
    return MaskPrompts.stack([sample_prompts(row, count, rounds, rng, truth_grid=grid) for row, rng in pairs])


def test_the_truth_loss_is_what_the_decoders_own_calls_make(decoder: Sam, rows: list[CacheRow]) -> None:
    """Of a point's three masks the best one counts, of a box the single one; an image without masks counts as 0."""
    student, size = stacked(rows)
    student += 0.2 * torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
    prompts = truths_of(rows, 4, rounds=0)
    inside, pe, expected = pixels_inside(size, SIZE, SIZE // 4), decoder.prompt_encoder.get_dense_pe(), []
    for image in range(len(rows)):
        asked = [((point[None, None], torch.ones(1, 1)), None) for point in prompts.points[image]]
        asked += [(None, box[None]) for box in prompts.boxes[image]]
        for number, (points, box) in enumerate(asked):
            with torch.no_grad():
                tokens = decoder.prompt_encoder(points, box, None)
                masks, _ = decoder.mask_decoder(student[image : image + 1], pe, *tokens, points is not None)
            q = prompts.truths[image, number].numpy() / 255
            keep = inside[image].numpy()
            p = 1 / (1 + np.exp(-masks[0].double().numpy()[:, keep]))
            q = q[keep]
            right = p * q + (1 - p) * (1 - q)
            alpha = 0.25 * q + 0.75 * (1 - q)
            focal = (-alpha * (1 - right) ** 2 * (q * np.log(p) + (1 - q) * np.log(1 - p))).mean(1)
            dice = 1 - (2 * (p * q).sum(1) + 1) / (p.sum(1) + q.sum() + 1)
            assert len(p) == (3 if points is not None else 1)
            expected.append((20 * focal + dice).min())
    objective = Objective(SIZE, decoder)
    with torch.no_grad():
        found = objective(losses_of(truth=1), student, student, size, prompts)["truth"].item()
        assert found == pytest.approx(np.mean(expected), rel=1e-4)
        prompts.labelled[1] = False
        without = objective(losses_of(truth=1), student, student, size, prompts)["truth"].item()
    kept = np.reshape(expected, (3, 4))[[0, 2]].sum() / 12
    assert without == pytest.approx(kept, rel=1e-4)


def test_only_the_best_of_three_masks_learns() -> None:
    """The gradient at each mask's logits, with a decoder that gives what it is told."""

    class Told(PromptedDecoder):
        def __init__(self, logits: torch.Tensor, predicted_iou: torch.Tensor) -> None:
            self.logits, self.predicted_iou, self.image_size = logits, predicted_iou, 4 * logits.shape[-1]

        def tokens(self, *_: object) -> torch.Tensor:
            return torch.empty(0)

        def masks(self, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
            return self.logits, self.predicted_iou

    truth = torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
    truth[:, :, :4] = 255
    sure = truth[:, :, None].float() / 255 * 8 - 4
    # Of the point's masks (1 to 3) the third is right, though another is predicted to be; the box's is 0.
    logits = torch.cat([sure, -sure, -sure, sure], dim=2).clone().requires_grad_()
    predicted = torch.tensor([[[0.1, 0.9, 0.2, 0.3]] * 2])
    prompts = MaskPrompts(torch.zeros(1, 1, 2), torch.zeros(1, 1, 4), torch.zeros(1, 2, 0), truth, torch.tensor([True]))
    truth_loss(Told(logits, predicted), torch.empty(0), torch.tensor([[32, 32]]), prompts).backward()
    assert logits.grad is not None
    learning = logits.grad.abs().amax(dim=(3, 4)).bool()
    assert learning.int().tolist() == [[[0, 0, 0, 1], [1, 0, 0, 0]]]


def test_descending_the_truth_loss_brings_the_masks_to_the_annotators(decoder: Sam, rows: list[CacheRow]) -> None:
    teacher, size = stacked(rows)
    student = (teacher + 0.5 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    objective, prompts = Objective(SIZE, decoder), truths_of(rows, 4, rounds=1)
    optimizer = torch.optim.Adam([student], lr=0.03)
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        value = objective(losses_of(truth=1), student, teacher, size, prompts)["truth"]
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.6 * values[0]
