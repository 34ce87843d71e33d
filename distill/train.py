"""Train: a student learns the cached embeddings. The loop is `train`; it reads from top to bottom."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from distill.evaluate.watch import MaskWatch
from distill.losses import embedding_errors, weighted_loss
from distill.recipe import Recipe, to_yaml
from distill.run import bind_cache, open_cache, read_metrics, trained_student
from embeddings_cache.files import TEMPORARY, publish, whole_file
from embeddings_cache.format import read_info
from embeddings_cache.preprocess import pad_pixels, to_encoder_input
from embeddings_cache.progress import progress_bar
from embeddings_cache.reader import EmbeddingsCache
from students import InputError, StudentConfig, build_encoder, save_student

CHECKPOINTS_KEPT = 2

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def train(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Train the recipe's student, or go on from the latest checkpoint; writes `student.safetensors` at the end.

    Returns:
        False where the student was there already.

    Raises:
        InputError: no finished cache, one of another recipe or teacher, or fewer images than a batch takes.
    """
    run_dir = Path(recipe.run_dir)
    info = read_info(Path(recipe.cache.dir))
    if info is not None and accelerator.is_main_process:
        bind_cache(recipe, info.identity)
    if trained_student(recipe).exists():
        accelerator.print(f"train: {trained_student(recipe)} is there already")
        return False
    cache = open_cache(recipe)
    train_rows, val_rows = cache.split(recipe.data.val_images)
    plan = Plan.of(recipe, len(train_rows), accelerator.num_processes)
    set_seed(recipe.seed)
    prefer_determinism(accelerator)

    student: nn.Module = build_encoder(
        student_config(recipe, cache.info.identity.embedding_shape[0]), recipe.student.pretrained
    )
    loss_of = weighted_loss(recipe.train.loss)
    optimizer = torch.optim.AdamW(parameter_groups(student, recipe.train.weight_decay), lr=recipe.train.lr)
    images = CachedImages(cache)
    sampler = EpochSampler(train_rows, plan.steps_per_epoch * recipe.train.batch_size, recipe.seed)
    options = loader_options(recipe, accelerator)
    loader = DataLoader(images, plan.micro_batch, sampler=sampler, **options)
    val_loader = DataLoader(Subset(images, val_rows), plan.micro_batch, **options)
    student, optimizer, loader, val_loader = accelerator.prepare(student, optimizer, loader, val_loader)

    watched = MaskWatch(recipe, cache, val_rows, accelerator)
    step = restore_latest(run_dir / "checkpoints", accelerator)
    metrics = Metrics(run_dir, accelerator, step)

    def validated() -> dict[str, float]:
        return {**validate(student, val_loader, accelerator), **watched(student)}

    if step == 0:
        metrics.write(0, 0, validated())
    progress = progress_bar(accelerator, "train", "steps", total=plan.steps, initial=step)
    losses: list[torch.Tensor] = []
    since = time.perf_counter()

    for epoch in range(step // plan.steps_per_epoch, recipe.train.epochs):
        sampler.epoch = epoch
        done = (step - epoch * plan.steps_per_epoch) * recipe.train.accumulate
        student.train()
        for pixels, input_size, target in accelerator.skip_first_batches(loader, done) if done else loader:
            with accelerator.accumulate(student):
                for group in optimizer.param_groups:
                    group["lr"] = plan.lr(step)
                loss = loss_of(student(to_encoder_input(pixels, input_size)), target.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(student.parameters(), recipe.train.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if not accelerator.sync_gradients:
                continue
            step += 1
            progress.update()
            if step % recipe.train.log_every == 0 or step == plan.steps:
                mean = mean_over_processes(losses, accelerator, step)
                rate = len(losses) * plan.micro_batch * accelerator.num_processes / (time.perf_counter() - since)
                metrics.write(step, epoch, {"loss": mean, "lr": plan.lr(step - 1), "images_per_second": rate})
                progress.set_postfix(loss=f"{mean:.4f}", refresh=False)
                losses, since = [], time.perf_counter()
            pause = time.perf_counter()
            if step % plan.steps_per_epoch == 0:
                metrics.write(step, epoch, validated())
                student.train()
            if step % recipe.train.checkpoint_every == 0 and step < plan.steps:
                save_checkpoint(run_dir / "checkpoints", step, accelerator)
            since += time.perf_counter() - pause

    progress.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        metadata = {"recipe": to_yaml(recipe), "steps": str(step), "teacher_sha256": cache.info.identity.teacher_sha256}
        with whole_file(trained_student(recipe)) as temporary:
            save_student(temporary, accelerator.unwrap_model(student), metadata)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return True


@dataclass(frozen=True)
class Plan:
    """Numbers that follow from the recipe, the data and the number of processes."""

    micro_batch: int
    steps_per_epoch: int
    steps: int
    warmup: int
    peak_lr: float

    @classmethod
    def of(cls, recipe: Recipe, images: int, processes: int) -> "Plan":
        """Raises `InputError` where a batch does not divide or the data cannot fill one."""
        batch, accumulate = recipe.train.batch_size, recipe.train.accumulate
        check_batch(recipe, processes)
        if images < batch:
            raise InputError(f"train.batch_size={batch} is more than the {images} training images in the cache")
        steps = images // batch * recipe.train.epochs
        warmup = min(recipe.train.warmup_steps, steps // 10)
        return cls(batch // (processes * accumulate), images // batch, steps, warmup, recipe.train.lr)

    def lr(self, step: int) -> float:
        """Learning rate of the step that follows `step` finished ones: linear warm-up, then cosine to 0."""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / (self.warmup + 1)
        part = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * part))


def check_batch(recipe: Recipe, processes: int) -> None:
    """Raise `InputError` unless the batch divides among the processes and their forward passes."""
    batch, accumulate = recipe.train.batch_size, recipe.train.accumulate
    if batch % (processes * accumulate):
        raise InputError(
            f"train.batch_size={batch} does not divide among {processes} processes × train.accumulate={accumulate}"
        )


class CachedImages(Dataset[Batch]):
    """A row of the cache as tensors: padded pixels uint8 (3, S, S), input size (2,), embedding float16 (C, h, w)."""

    def __init__(self, cache: EmbeddingsCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> Batch:
        row = self.cache[index]
        pixels = pad_pixels(row.pixels(), self.cache.info.identity.image_size)
        return pixels, torch.tensor(row.input_size), torch.from_numpy(row.embedding)


class EpochSampler(Sampler[int]):
    """The first `count` of the rows in an order that is a function of seed and epoch alone."""

    def __init__(self, rows: list[int], count: int, seed: int) -> None:
        self.rows, self.count, self.seed, self.epoch = rows, count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)[: self.count].tolist()


class Metrics:
    """`metrics.jsonl` and TensorBoard, from the main process. A resumed run goes on behind the step it resumes from."""

    def __init__(self, run_dir: Path, accelerator: Accelerator, resumed_step: int) -> None:
        self.path, self.accelerator = run_dir / "metrics.jsonl", accelerator
        accelerator.init_trackers("tensorboard")
        if accelerator.is_main_process:
            kept = [line for line in read_metrics(run_dir) if resumed_step and line["step"] <= resumed_step]
            with whole_file(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Append one line."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")


def loader_options(recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """How the cache is read. On a CPU no workers by default: they would compete with the training for the cores, and a
    worker forked off a training process of many GB keeps that memory from being reused."""
    on_cpu = accelerator.device.type == "cpu"
    workers = recipe.train.workers if recipe.train.workers is not None else (0 if on_cpu else 4)
    # A generator of its own: a loader draws from it for every pass, and on resuming has fewer passes to make.
    generator = torch.Generator().manual_seed(recipe.seed)
    options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": not on_cpu}
    return {**options, "generator": generator}


def prefer_determinism(accelerator: Accelerator) -> None:
    """On a CPU, use algorithms that give the same bits every time; TinyViT's attention biases need it."""
    torch.use_deterministic_algorithms(accelerator.device.type == "cpu", warn_only=True)
    # This one costs time, and nothing here reads such memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def student_config(recipe: Recipe, channels: int = 256) -> StudentConfig:
    """The recipe's student, with as many channels as the teacher's embedding has."""
    student = recipe.student
    return StudentConfig(student.name, recipe.image_size, channels, dict(student.overrides), student.downsample)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups: no decay on biases and norms, which are the parameters of at most one dimension."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def validate(student: nn.Module, loader: DataLoader, accelerator: Accelerator) -> dict[str, float]:
    """Embedding MSE and cosine on the held-out images, averaged over images."""
    student.eval()
    errors = []
    for pixels, input_size, target in loader:
        batch = embedding_errors(student(to_encoder_input(pixels, input_size)).float(), target.float())
        errors.append(accelerator.gather_for_metrics(torch.stack(batch, dim=1)))
    mse, cosine = torch.cat(errors).cpu().double().mean(dim=0).tolist()
    return {"val_mse": mse, "val_cosine": cosine}


def mean_over_processes(losses: list[torch.Tensor], accelerator: Accelerator, step: int) -> float:
    """The mean of the losses since the last line, over all processes.

    Raises:
        InputError: it is not a finite number; going on would only spoil the weights further.
    """
    mean = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
    if not math.isfinite(mean):
        raise InputError(f"the training loss is {mean} at step {step}: a lower train.lr or mixed_precision=no may help")
    return mean


def save_checkpoint(directory: Path, step: int, accelerator: Accelerator) -> None:
    """All state as `step-NNNNNNNN`, whole or not at all; the last few are kept."""
    temporary, final = directory / f"{TEMPORARY}step", directory / f"step-{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        publish(temporary, final)
        for old in checkpoints(directory)[:-CHECKPOINTS_KEPT]:
            shutil.rmtree(old)


def restore_latest(directory: Path, accelerator: Accelerator) -> int:
    """Load the latest checkpoint into what was prepared, and say how many steps it had done; 0 without one."""
    found = checkpoints(directory)
    if not found:
        return 0
    accelerator.print(f"train: going on from {found[-1]}")
    accelerator.load_state(str(found[-1]))
    return int(found[-1].name.removeprefix("step-"))


def checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(directory.glob("step-*"))
