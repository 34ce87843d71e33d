"""Which images a process takes when, and how they come from the cache to the device."""

import gc
import pickle
import signal
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from distill.recipe import Recipe
from distill.training.limits import limit_of_workers, refuse_few_files, refuse_little_shared_memory
from distill.training.plan import Plan, phase_settings, settings_in, weighs_masks
from distill.training.prompts import MaskPrompts, sample_prompts
from distill.training.rows import Group
from embeddings_cache.images import pad_pixels, to_encoder_input
from embeddings_cache.shards import EmbeddingsCache
from students import InputError

WORKERS_ON_A_GPU = 4
SECONDS_TO_SAVE = 30
"""As long as launchers give a process between SIGTERM and SIGKILL."""

PROMPTS_STREAM = 1
"""Sets the random numbers of prompts apart from those of the order."""

Draw = tuple[int, int]
"""Epoch and row: with the seed, all that decides what a sample is."""


@dataclass(frozen=True)
class Sample:
    """A row of the cache as tensors: pixels uint8 (h, w, 3), embedding float16 (C, h/16, w/16) of the padded image."""

    key: str
    pixels: torch.Tensor
    input_size: tuple[int, int]
    embedding: torch.Tensor
    prompts: MaskPrompts | None


@dataclass(frozen=True)
class Batch:
    """B samples: pictures of their own sizes, input sizes int (B, 2), teacher's embeddings float16 (B, C, h, w)."""

    keys: list[str]
    pixels: list[torch.Tensor]
    input_size: torch.Tensor
    teacher: torch.Tensor
    prompts: MaskPrompts | None

    @classmethod
    def of(cls, samples: list[Sample]) -> "Batch":
        """Collate."""
        prompts = [sample.prompts for sample in samples if sample.prompts is not None]
        return cls(
            [sample.key for sample in samples],
            [sample.pixels for sample in samples],
            torch.tensor([sample.input_size for sample in samples]),
            torch.stack([sample.embedding for sample in samples]),
            MaskPrompts.stack(prompts) if prompts else None,
        )

    def to(self, device: torch.device) -> "Batch":
        """On the device; to a GPU, from pinned memory, the copy is under way while work goes on."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self) -> "Batch":
        """In memory that a GPU can read by itself; the loader calls this."""
        return self._map(torch.Tensor.pin_memory)

    def encoder_input(self, image_size: int) -> torch.Tensor:
        """Padded and normalised on the device where the pixels are: float32 (B, 3, S, S)."""
        padded = torch.stack([pad_pixels(pixels, image_size) for pixels in self.pixels])
        return to_encoder_input(padded, self.input_size)

    def _map(self, change: Any) -> "Batch":
        prompts = self.prompts and MaskPrompts(*(change(tensor) for tensor in vars(self.prompts).values()))
        return replace(
            self,
            pixels=[change(pixels) for pixels in self.pixels],
            input_size=change(self.input_size),
            teacher=change(self.teacher),
            prompts=prompts,
        )


class Handed:
    """A batch on its way out of a worker, its tensors in shared memory already.

    Left to PyTorch, that is done by the thread that feeds the worker's queue: where shared memory or open files do not
    suffice, the thread prints an error and drops the batch, for which the training process then waits for ever. Here
    it fails where the batch is made, and the loader raises it.
    """

    def __init__(self, batch: Batch) -> None:
        self.pickled = bytes(ForkingPickler.dumps(batch))

    def open(self) -> Batch:
        """In the process that it was made for; once."""
        batch: Batch = pickle.loads(self.pickled)
        return batch

    def pin_memory(self) -> Batch:
        """The loader calls this, where there is a GPU."""
        return self.open().pin_memory()


def collate(samples: list[Sample]) -> Batch | Handed:
    """A batch, in a worker ready to be handed over."""
    batch = Batch.of(samples)
    return Handed(batch) if get_worker_info() is not None else batch


class CachedImages(Dataset[Sample]):
    """Samples by epoch and row. Prompts are drawn where the epoch's losses are of masks, by seed, epoch and key."""

    def __init__(self, cache: EmbeddingsCache, recipe: Recipe, with_prompts: bool = True) -> None:
        self.cache, self.recipe, self.with_prompts = cache, recipe, with_prompts

    @property
    def bytes_each(self) -> int:
        """What a sample takes at most: its embedding, a square picture, and true masks where some phase has them."""
        channels, height, width = self.cache.info.identity.embedding_shape
        prompts = max(each.mask_prompts if each.loss.get("truth") else 0 for each in phase_settings(self.recipe))
        return (
            2 * channels * height * width + 3 * self.recipe.image_size**2 + prompts * (self.recipe.image_size // 4) ** 2
        )

    def __getitem__(self, draw: Draw) -> Sample:
        epoch, index = draw
        row = self.cache[index]
        prompts = None
        if self.with_prompts and weighs_masks(settings := settings_in(self.recipe, epoch)):
            key = list(row.key.encode())
            rng = np.random.default_rng([self.recipe.seed, epoch, PROMPTS_STREAM, *key])
            grid = (self.recipe.image_size, self.recipe.image_size // 4) if settings.loss.get("truth") else None
            prompts = sample_prompts(row, settings.mask_prompts, settings.mask_rounds, rng, settings.mask_points, grid)
        return Sample(row.key, torch.tensor(row.pixels()), row.input_size, torch.from_numpy(row.embedding), prompts)


class TrainingOrder(Sampler[list[Draw]]):
    """This process's micro-batches, from a step on to the end of training.

    The order of an epoch is a function of seed, epoch and the group's rows alone. A step takes the next images of it,
    each process of the group an equal part, so that the batches do not depend on the number of processes, nor on where
    a run was interrupted.
    """

    def __init__(self, rows: list[int], plan: Plan, seed: int, group: Group, first_step: int = 0) -> None:
        self.rows, self.plan, self.seed, self.group, self.first_step = rows, plan, seed, group, first_step

    def __len__(self) -> int:
        return (self.plan.steps - self.first_step) * self.plan.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        share = self.plan.micro_batch * self.plan.accumulate
        order_of: tuple[int, np.ndarray] = (-1, np.empty(0))
        for step in range(self.first_step, self.plan.steps):
            epoch, place = divmod(step, self.plan.steps_per_epoch)
            if order_of[0] != epoch:
                order_of = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
            start = (place * self.group.size + self.group.rank) * share
            for first in range(start, start + share, self.plan.micro_batch):
                yield [(epoch, int(row)) for row in order_of[1][first : first + self.plan.micro_batch]]


class TimedBatches:
    """Batches on the device; `waited` adds up the seconds that were spent on waiting for them.

    Whoever may stop early closes the iterator, which ends the workers.
    """

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self.loader, self.device, self.waited = loader, device, 0.0

    def __iter__(self) -> Generator[Batch, None, None]:
        batches: Any = None
        try:
            while True:
                began, failure = time.perf_counter(), ""
                try:
                    if batches is None:
                        batches = iter(self.loader)  # starts the workers
                    batch = next(batches, None)
                    if isinstance(batch, Handed):
                        batch = batch.open()
                except InputError as error:  # a worker's comes with its traceback, and ends with what it says
                    failure = str(error).rpartition("InputError: ")[2].strip()
                except (RuntimeError, OSError, EOFError) as error:
                    if not self.loader.num_workers or not (failure := limit_of_workers(error, self.loader.num_workers)):
                        raise
                if failure:
                    gc.collect()  # the error's traceback, a cycle, would keep the workers alive
                    raise InputError(failure)
                self.waited += time.perf_counter() - began
                if batch is None:
                    return
                yield batch.to(self.device)
        finally:
            del batches


def make_loader(
    images: CachedImages, order: Sampler[list[Draw]] | list[list[Draw]], recipe: Recipe, device: torch.device
) -> DataLoader:
    """Reads and decodes, in processes of their own where there are to be any."""
    workers = workers_of(recipe, device)
    return DataLoader(
        images,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_trainer,
        # Of its own: the loader draws from it, which must not move the run's random numbers.
        generator=torch.Generator().manual_seed(recipe.seed),
    )


def workers_of(recipe: Recipe, device: torch.device) -> int:
    """How many processes read for this one.

    On a CPU there are none by default: they would compete with the training for the cores, and a worker forked off a
    training process of many GB keeps that memory from being reused.
    """
    if recipe.train.workers is not None:
        return recipe.train.workers
    return 0 if device.type == "cpu" else WORKERS_ON_A_GPU


def check_limits(images: CachedImages, batch: int, held_out: int, recipe: Recipe, device: torch.device) -> None:
    """Raise `InputError` where workers will not have what they need, before the first of them is started.

    Args:
        batch: images of a forward pass.
        held_out: images that this process validates on.
    """
    if workers := workers_of(recipe, device):
        refuse_little_shared_memory(images.bytes_each * batch, workers, -(-held_out // batch))
        refuse_few_files(batch, workers, len(images.cache.shards))


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole group; the trainer ends its workers when it has saved.

    One that it forgets ends by itself a while after SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(SECONDS_TO_SAVE))
