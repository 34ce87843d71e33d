"""Numbers that follow from the recipe, the data and the number of processes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from distill.recipe import Recipe
from students import InputError


@dataclass(frozen=True)
class Plan:
    """How long training is and what happens when; `steps` are the optimizer's, `micro_batch` images a forward pass."""

    micro_batch: int
    accumulate: int
    steps_per_epoch: int
    steps: int
    warmup: int
    peak_lr: float

    @classmethod
    def of(cls, recipe: Recipe, images: int, processes: int) -> "Plan":
        """The plan for so many training images.

        Raises:
            InputError: the batch does not divide among the processes, or the images cannot fill one.
        """
        batch, accumulate = recipe.train.batch_size, recipe.train.accumulate
        check_batch(recipe, processes)
        if images < batch:
            raise InputError(f"train.batch_size={batch} is more than the {images} training images in the cache")
        steps = images // batch * sum(epochs for epochs, _ in phases(recipe))
        warmup = min(recipe.train.warmup_steps, steps // 10)
        return cls(batch // (processes * accumulate), accumulate, images // batch, steps, warmup, recipe.train.lr)

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


def phases(recipe: Recipe) -> list[tuple[int, Mapping[str, float]]]:
    """Epochs and weights of the losses of each phase, in order."""
    return [(recipe.train.epochs, recipe.train.loss), *((phase.epochs, phase.loss) for phase in recipe.train.then)]


def loss_weights(recipe: Recipe, epoch: int) -> Mapping[str, float]:
    """What the losses weigh in an epoch, counted from 0."""
    for epochs, weights in phases(recipe):
        if epoch < epochs:
            return weights
        epoch -= epochs
    raise ValueError(f"there are no {epoch + 1} more epochs")


def wants_masks(recipe: Recipe) -> bool:
    """Whether any phase compares masks, for which the teacher's decoder is needed."""
    return any(epochs and weights.get("mask") for epochs, weights in phases(recipe))
