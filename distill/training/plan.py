"""Numbers that follow from the recipe, the data and the number of processes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from distill.recipe import Recipe
from distill.schema import MASK_LOSSES, PhaseRecipe, TrainRecipe
from students import InputError

OF_A_SCHEDULE = ("lr", "lr_end", "lr_per", "warmup_steps", "warmup_epochs")
"""Keys with which a phase begins a schedule of its own."""


@dataclass(frozen=True)
class Schedule:
    """Learning rates of `steps` steps from `first` on: linear warm-up to `peak`, then cosine to `end`.

    With `prefix` the cosine begins at the peak; without, it has run below the warm-up from the first step on, so that
    the rate drops when that ends. The latter is what timm's `CosineLRScheduler` does unless told otherwise.
    """

    first: int
    steps: int
    warmup: int
    peak: float
    end: float = 0.0
    prefix: bool = True

    def lr(self, step: int) -> float:
        """Of the step that follows `step` finished ones."""
        done = step - self.first
        if done < self.warmup:
            return self.peak * (done + 1) / (self.warmup + 1)
        before = self.warmup if self.prefix else 0
        part = (done - before) / max(1, self.steps - before)
        return self.end + (self.peak - self.end) * 0.5 * (1 + math.cos(math.pi * part))


@dataclass(frozen=True)
class Phase:
    """Some epochs that are trained alike: `settings` is `train` with what the phase says instead, `first` its first
    step. Phases that say nothing of learning rates share the schedule of the one before."""

    settings: TrainRecipe
    schedule: Schedule
    first: int

    @property
    def begins_anew(self) -> bool:
        """Whether the optimizer begins its moments with the phase."""
        return self.first == self.schedule.first


@dataclass(frozen=True)
class Plan:
    """How long training is and what happens when; steps are the optimizer's, `micro_batch` images a forward pass."""

    micro_batch: int
    accumulate: int
    steps_per_epoch: int
    phases: tuple[Phase, ...]

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
        phases = tuple(_phases(recipe, images // batch))
        return cls(batch // (processes * accumulate), accumulate, images // batch, phases)

    @property
    def steps(self) -> int:
        """Of all phases."""
        last = self.phases[-1]
        return last.first + last.settings.epochs * self.steps_per_epoch

    def phase(self, step: int) -> Phase:
        """That of the step that follows `step` finished ones; after the last step, the last one."""
        return next(phase for phase in reversed(self.phases) if phase.first <= step)

    def lr(self, step: int) -> float:
        """Learning rate of the step that follows `step` finished ones."""
        return self.phase(step).schedule.lr(step)

    def describe(self) -> Iterator[str]:
        """A line a phase: how long, what is made small, at which learning rate."""
        for number, phase in enumerate(self.phases, start=1):
            settings, schedule = phase.settings, phase.schedule
            if not settings.epochs:
                continue
            named = f"phase {number} of {len(self.phases)}: " if len(self.phases) > 1 else ""
            losses = " + ".join(f"{weight:g} {name}" for name, weight in settings.loss.items() if weight)
            rate = "the learning rate goes on"
            if phase.begins_anew:
                rate = f"learning rate up to {schedule.peak:.3g} in {schedule.warmup} steps, down to {schedule.end:.3g}"
                if settings.lr_per:
                    rate += f" ({settings.lr:g} is for a batch of {settings.lr_per}, this one is {settings.batch_size})"
            epochs = f"{settings.epochs} epoch{'s' if settings.epochs > 1 else ''}"
            yield f"{named}{epochs}, {settings.epochs * self.steps_per_epoch:,} steps, {losses}; {rate}"


def check_batch(recipe: Recipe, processes: int) -> None:
    """Raise `InputError` unless the batch divides among the processes and their forward passes."""
    batch, accumulate = recipe.train.batch_size, recipe.train.accumulate
    if batch % (processes * accumulate):
        raise InputError(
            f"train.batch_size={batch} does not divide among {processes} processes × train.accumulate={accumulate}"
        )


def phase_settings(recipe: Recipe) -> list[TrainRecipe]:
    """`train` as it is in each phase, in order."""
    train = replace(recipe.train, then=[])
    return [train, *(replace(train, **_said(phase)) for phase in recipe.train.then)]


def settings_in(recipe: Recipe, epoch: int) -> TrainRecipe:
    """`train` as it is in an epoch, counted from 0."""
    for settings in phase_settings(recipe):
        if epoch < settings.epochs:
            return settings
        epoch -= settings.epochs
    raise ValueError(f"there are no {epoch + 1} more epochs")


def wants_masks(recipe: Recipe, of: tuple[str, ...] = MASK_LOSSES) -> bool:
    """Whether any phase has a loss of masks, for which the teacher's decoder is needed; or one of some of them."""
    return any(weighs_masks(settings, of) for settings in phase_settings(recipe) if settings.epochs)


def weighs_masks(settings: TrainRecipe, of: tuple[str, ...] = MASK_LOSSES) -> bool:
    """The same of one phase."""
    return any(settings.loss.get(name) for name in of)


def _phases(recipe: Recipe, steps_per_epoch: int) -> Iterator[Phase]:
    own = [True, *(any(key in _said(phase) for key in OF_A_SCHEDULE) for phase in recipe.train.then)]
    settings = phase_settings(recipe)
    first, schedule = 0, None
    for place, phase in enumerate(settings):
        if schedule is None or own[place]:
            until = next((later for later in range(place + 1, len(own)) if own[later]), len(own))
            steps = sum(each.epochs for each in settings[place:until]) * steps_per_epoch
            schedule = _schedule(phase, first, steps, steps_per_epoch)
        yield Phase(phase, schedule, first)
        first += phase.epochs * steps_per_epoch


def _schedule(settings: TrainRecipe, first: int, steps: int, steps_per_epoch: int) -> Schedule:
    warmup = min(settings.warmup_steps, steps // 10)
    if settings.warmup_epochs:
        warmup = min(round(settings.warmup_epochs * steps_per_epoch), steps // 2)
    scale = settings.batch_size / settings.lr_per if settings.lr_per else 1.0
    return Schedule(first, steps, warmup, settings.lr * scale, settings.lr_end * scale, settings.warmup_prefix)


def _said(phase: PhaseRecipe) -> dict[str, Any]:
    said = {key: value for key, value in vars(phase).items() if value is not None}
    if "warmup_steps" in said:
        said.setdefault("warmup_epochs", 0.0)  # or those of `train` would count instead
    return said
