import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from distill.evaluate.masks import evaluate_masks
from distill.launch import create_accelerator
from distill.recipe import Recipe, load_recipe
from distill.run import claim_run_dir, read_metrics
from distill.schema import PhaseRecipe, StudentRecipe, TrainRecipe
from distill.student import student_config
from distill.train import make_optimizer, parameter_groups, prepare, train
from distill.training.monitor import Monitor, Step
from embeddings_cache.images.preprocessing import pad_pixels, to_encoder_input
from embeddings_cache.shards.reader import EmbeddingsCache
from students import InputError, build_encoder, create_student, load_student, read_metadata
from support import TINY, places


@pytest.fixture
def recipe(finished_run: Path, scene_tar: Path, tmp_path: Path) -> Recipe:
    """The tiny recipe on the finished cache, with a run directory of its own."""
    arguments = [*TINY, *places(finished_run, scene_tar), f"run_dir={tmp_path / 'run'}", "train.workers=0"]
    return load_recipe(arguments)


@pytest.fixture
def accelerator(recipe: Recipe) -> Accelerator:
    return create_accelerator(recipe)


def weights(run_dir: str) -> dict[str, torch.Tensor]:
    return load_student(Path(run_dir) / "student.safetensors").state_dict()


def metrics(run_dir: str | Path) -> list[dict]:
    """The lines, without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("images_per_second", 1) > 0 and 0 <= line.pop("loader_wait", 0) < 1 for line in lines)
    return lines


def test_norms_of_all_processes_keep_the_activations_that_timm_puts_into_them(
    recipe: Recipe, accelerator: Accelerator
) -> None:
    recipe.student = StudentRecipe("mobilenetv4_conv_small", 64, "pyramid", neck_depth=1)
    recipe.train.batch_norm = "sync"
    two = SimpleNamespace(num_processes=2, prepare=lambda *each: each, device=accelerator.device)
    torch.manual_seed(0)
    student, _, _ = prepare(recipe, 128, two)  # type: ignore[arg-type]
    torch.manual_seed(0)
    expected = build_encoder(student_config(recipe, 128)).eval()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in student.modules())
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(image), expected(image), atol=1e-5, rtol=0)


def plain_training(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The same training as a bare PyTorch loop, written from the recipe's words."""
    cache = EmbeddingsCache(Path(recipe.cache.dir))
    rows, _ = cache.split(recipe.data.val_images)
    torch.manual_seed(recipe.seed)
    student = create_student(recipe.student.name, recipe.image_size, 128, **recipe.student.overrides)
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim <= 1]
    size, per_epoch = recipe.train.batch_size, len(rows) // recipe.train.batch_size
    total = per_epoch * recipe.train.epochs
    warmup = min(recipe.train.warmup_steps, total // 10)
    phases = [(recipe.train.epochs, "mse", recipe.train.lr, 0.0, warmup, 0.05, recipe.train.clip_norm)]
    if recipe.train.then:  # L1_AFTER
        phases.append((1, "l1", 0.01, 0.001, 0, 0.5, 0.1))
    step, average, epoch = 0, dict(student.state_dict()), -1
    for phase_epochs, loss, peak, end, warmup, decay, clip in phases:
        groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer, first, total = torch.optim.AdamW(groups), step, per_epoch * phase_epochs
        for start in [start for _ in range(phase_epochs) for start in range(0, per_epoch * size, size)]:
            if start == 0:
                epoch += 1
                order = np.random.default_rng([recipe.seed, epoch]).permutation(rows)
            done = step - first
            cosine = end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = peak * (done + 1) / (warmup + 1) if done < warmup else cosine
            optimizer.zero_grad()
            for part in np.split(order[start : start + size], recipe.train.accumulate):
                batch = [cache[int(index)] for index in part]
                pixels = torch.stack([pad_pixels(row.pixels(), recipe.image_size) for row in batch])
                images = to_encoder_input(pixels, torch.tensor([row.input_size for row in batch]))
                target = torch.stack([torch.from_numpy(row.embedding).float() for row in batch])
                difference = student(images) - target
                errors = [
                    # the quickstart leaves out cells of 16 px that only cover padding
                    distance[:, : -(-row.input_size[0] // 16), : -(-row.input_size[1] // 16)].mean()
                    for distance, row in zip(difference**2 if loss == "mse" else abs(difference), batch, strict=True)
                ]
                (torch.stack(errors).mean() / recipe.train.accumulate).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
            optimizer.step()
            step += 1
            # timm's warm-up of the decay: 0 at the first step, so that the average begins with its weights
            kept = min(recipe.train.ema, 1 - step ** (-2 / 3)) if recipe.train.ema else 0.0
            for name, tensor in student.state_dict().items():
                whole = not tensor.is_floating_point()
                average[name] = tensor.clone() if whole else kept * average[name] + (1 - kept) * tensor
    return average


L1_AFTER = PhaseRecipe(
    1, {"l1": 1.0}, lr=0.02, lr_end=0.002, lr_per=8, warmup_steps=0, weight_decay=0.5, clip_norm=0.1
)  # TINY's batch is 4


@pytest.mark.parametrize(("accumulate", "ema", "then"), [(1, 0.0, []), (2, 0.7, [L1_AFTER])])
def test_equals_a_plain_pytorch_loop(accumulate: int, ema: float, then: list[PhaseRecipe], recipe: Recipe) -> None:
    # Adam divides by gradients near 0, and so enlarges what another memory format rounds otherwise.
    recipe.train = replace(recipe.train, accumulate=accumulate, ema=ema, then=then, channels_last=False)
    train(recipe, create_accelerator(recipe))
    expected = plain_training(recipe)
    for name, tensor in weights(recipe.run_dir).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4)


def test_learns_the_held_out_embeddings(recipe: Recipe, accelerator: Accelerator) -> None:
    recipe.train = replace(recipe.train, epochs=30)
    train(recipe, accelerator)
    held_out = [line["val_mse"] for line in metrics(recipe.run_dir) if "val_mse" in line]
    assert len(held_out) == 31
    assert held_out[-1] < 0.5 * held_out[0]
    # It looks at the image: what it makes of one is nearer to the teacher's embedding of that one than of others. For
    # a student that always said the same, both means would be equal.
    cache = EmbeddingsCache(Path(recipe.cache.dir))
    rows = [cache[index] for index in cache.split(recipe.data.val_images)[1]]
    pixels = torch.stack([pad_pixels(row.pixels(), recipe.image_size) for row in rows])
    with torch.no_grad():
        images = to_encoder_input(pixels, torch.tensor([row.input_size for row in rows]))
        ours = load_student(Path(recipe.run_dir) / "student.safetensors")(images)
    theirs = torch.stack([torch.from_numpy(row.embedding).float() for row in rows])
    errors = ((ours[:, None] - theirs[None]) ** 2).mean(dim=(2, 3, 4))
    others = errors[~torch.eye(len(rows), dtype=torch.bool)]
    assert errors.diagonal().mean() < 0.9 * others.mean()


def test_metrics_say_loss_and_rate_at_every_step_asked_for(recipe: Recipe, accelerator: Accelerator) -> None:
    recipe.train = replace(recipe.train, log_every=2)
    train(recipe, accelerator)
    lines = metrics(recipe.run_dir)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10]
    assert [line["step"] for line in lines if "val_mse" in line] == [0, 5, 10]
    assert all(0 < line["lr"] <= recipe.train.lr for line in lines if "lr" in line)
    assert list(Path(recipe.run_dir).glob("**/events.out.tfevents*"))


def test_masks_are_watched_as_evaluate_measures_them(recipe: Recipe, accelerator: Accelerator) -> None:
    recipe.train = replace(recipe.train, epochs=1, watch_images=4)
    recipe.evaluate = replace(recipe.evaluate, masks_per_image=3)
    train(recipe, accelerator)
    evaluate_masks(recipe, accelerator)
    measured = json.loads((Path(recipe.run_dir) / "evaluation.json").read_text())["masks"]["miou"]
    last = metrics(recipe.run_dir)[-1]
    for prompt in ("point", "box"):
        assert last[f"val_miou_{prompt}"] == pytest.approx(measured[prompt]["all"]["student_teacher"], abs=1e-4)


def test_without_the_teachers_weights_no_masks_are_watched(
    recipe: Recipe, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*arguments: object) -> None:
        raise InputError("teacher vit_h needs its weights")

    monkeypatch.setattr("distill.evaluate.watch.load_teacher", missing)
    recipe.train = replace(recipe.train, epochs=1)
    train(recipe, accelerator)
    assert "train: masks are not watched: teacher vit_h needs its weights" in capsys.readouterr().out
    assert not any("val_miou_box" in line for line in metrics(recipe.run_dir))


def test_the_student_carries_its_recipe(recipe: Recipe, accelerator: Accelerator, tmp_path: Path) -> None:
    train(recipe, accelerator)
    metadata = read_metadata(Path(recipe.run_dir) / "student.safetensors")
    (tmp_path / "again.yaml").write_text(metadata["recipe"])
    assert load_recipe([f"recipe={tmp_path / 'again.yaml'}"]) == recipe
    assert metadata["steps"] == "10"
    assert len(metadata["teacher_sha256"]) == 64


class Killed(BaseException):
    pass


DROPPING = {"widths": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "drop_path_rate": 0.5}
"""A TinyViT that draws random numbers in training, and whose attention biases are gathered by index."""


MASKS = [PhaseRecipe(1, {"mse": 1.0, "mask": 0.5})]
OWN = [PhaseRecipe(1, {"mask_bce": 5.0, "mask_dice": 5.0, "truth": 1.0}, lr=1e-3, clip_norm=0.01, mask_prompts=2)]


@pytest.mark.parametrize(
    ("checkpoint_every", "killed_at", "settings", "overrides"),
    [
        (5, 6, {}, None),
        (4, 3, {}, None),
        (3, 8, {"accumulate": 2, "ema": 0.8, "batch_norm": "frozen"}, None),
        (3, 8, {"workers": 2, "ema": 0.8, "epochs": 1, "then": MASKS}, None),
        (5, 6, {"epochs": 1, "then": OWN}, None),
        (3, 8, {"ema": 0.8}, DROPPING),
    ],
)
def test_a_run_that_was_interrupted_ends_with_the_same_weights(
    checkpoint_every: int,
    killed_at: int,
    settings: dict,
    overrides: dict | None,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe.train = replace(recipe.train, log_every=1, **settings)
    if overrides is not None:
        recipe.student = replace(recipe.student, name="tiny_vit_5m", overrides=overrides)
    train(recipe, create_accelerator(recipe))
    undisturbed, lines = weights(recipe.run_dir), metrics(recipe.run_dir)

    recipe.train = replace(recipe.train, checkpoint_every=checkpoint_every)  # which changes nothing either
    recipe.run_dir = str(tmp_path / "interrupted")
    accelerator = create_accelerator(recipe)
    steps = []
    original = Monitor.add

    def killing(monitor: Monitor, step: Step, settings: TrainRecipe) -> bool:
        steps.append(step.number)
        if step.number == killed_at and len(steps) == killed_at:
            raise Killed
        return original(monitor, step, settings)

    monkeypatch.setattr(Monitor, "add", killing)
    with pytest.raises(Killed):
        train(recipe, accelerator)
    assert not (Path(recipe.run_dir) / "student.safetensors").exists()
    train(recipe, create_accelerator(recipe))
    # It goes on from the last of those every so many steps, or from the best, at the end of the first epoch of five.
    kept = [killed_at // checkpoint_every * checkpoint_every, 5 if killed_at > 5 else 0]
    assert steps[killed_at] == max(kept) + 1
    for name, tensor in weights(recipe.run_dir).items():
        assert torch.equal(tensor, undisturbed[name]), name
    assert metrics(recipe.run_dir) == lines


def test_no_epochs_leave_the_student_untrained(recipe: Recipe, accelerator: Accelerator) -> None:
    recipe.train = replace(recipe.train, epochs=0)
    train(recipe, accelerator)
    (line,) = metrics(recipe.run_dir)
    assert line["step"] == 0
    torch.manual_seed(recipe.seed)
    student = create_student(recipe.student.name, recipe.image_size, 128, **recipe.student.overrides)
    assert all(torch.equal(tensor, student.state_dict()[name]) for name, tensor in weights(recipe.run_dir).items())


def test_a_finished_student_is_left_alone(recipe: Recipe, accelerator: Accelerator) -> None:
    train(recipe, accelerator)
    path = Path(recipe.run_dir) / "student.safetensors"
    before = path.stat().st_mtime_ns
    train(recipe, accelerator)
    assert path.stat().st_mtime_ns == before


def test_what_a_crash_left_of_a_line_is_dropped(recipe: Recipe, accelerator: Accelerator) -> None:
    Path(recipe.run_dir).mkdir()
    (Path(recipe.run_dir) / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(Path(recipe.run_dir)) == [{"step": 1, "loss": 2.0}]
    train(recipe, accelerator)
    assert metrics(recipe.run_dir)[0]["step"] == 0


@pytest.mark.parametrize("finished", [True, False])
def test_a_student_of_other_teacher_weights_is_not_taken_for_this_ones(
    finished: bool, recipe: Recipe, accelerator: Accelerator, tmp_path: Path
) -> None:
    recipe.train = replace(recipe.train, checkpoint_every=4)
    train(recipe, accelerator)
    if not finished:
        (Path(recipe.run_dir) / "student.safetensors").unlink()
    shutil.copytree(recipe.cache.dir, tmp_path / "other")
    for path in (tmp_path / "other").glob("shard-*.h5"):
        with h5py.File(path, "r+") as file:
            file.attrs["teacher_sha256"] = "0" * 64
    described = json.loads((tmp_path / "other" / "cache.json").read_text())
    described["identity"]["teacher_sha256"] = "0" * 64
    (tmp_path / "other" / "cache.json").write_text(json.dumps(described))
    recipe.cache = replace(recipe.cache, dir=str(tmp_path / "other"))
    with pytest.raises(InputError, match="learnt from another cache: SHA-256 of the teacher's weights"):
        train(recipe, create_accelerator(recipe))


def test_another_preprocessings_cache_is_refused(
    recipe: Recipe, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.run.fingerprint", lambda sixteen_bit: "something else")
    with pytest.raises(InputError, match="fingerprint of the preprocessing"):
        train(recipe, accelerator)


def test_another_recipes_cache_is_refused(recipe: Recipe, accelerator: Accelerator) -> None:
    recipe.image_size = 256
    recipe.teacher.name = "vit_b"
    with pytest.raises(InputError, match=r"teacher\.name: 'toy', not 'vit_b'; image_size: 128, not 256"):
        train(recipe, accelerator)


def test_a_run_directory_is_not_reused_for_another_recipe(recipe: Recipe, accelerator: Accelerator) -> None:
    claim_run_dir(recipe)
    train(recipe, accelerator)
    claim_run_dir(replace(recipe, evaluate=replace(recipe.evaluate, grid=2)))
    with pytest.raises(InputError, match=r"holds a run of another recipe: train\.epochs: 2, now 9\. Choose another"):
        claim_run_dir(replace(recipe, train=replace(recipe.train, epochs=9)))


@pytest.mark.parametrize(("theirs", "device", "ours"), [(None, "cuda", True), (True, "cpu", None)])
def test_a_checkpoint_goes_on_with_the_kernel_of_the_machine(
    theirs: bool | None, device: str, ours: bool | None
) -> None:
    """Of one from before a GPU took one kernel for all weights, or from a GPU: the next step stays what it was."""

    def step(student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        student(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    first = nn.Linear(5, 3)
    begun = torch.optim.AdamW(parameter_groups(first, 0.05), lr=0.01, fused=theirs)
    step(first, begun)
    second = copy.deepcopy(first)
    goes_on = make_optimizer(second, TrainRecipe(lr=0.01), torch.device(device))
    goes_on.load_state_dict(begun.state_dict())
    assert {group["fused"] for group in goes_on.param_groups} == {ours}
    step(first, begun)
    step(second, goes_on)
    torch.testing.assert_close(second.state_dict(), first.state_dict())
