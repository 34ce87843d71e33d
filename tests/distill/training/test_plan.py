"""When what happens, and which images a step takes."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from distill.recipe import Recipe, load_recipe
from distill.schema import PhaseRecipe, TrainRecipe
from distill.training.batches import TrainingOrder
from distill.training.plan import Phase, Plan, Schedule, settings_in, wants_masks
from distill.training.rows import Group
from students import InputError
from support import TINY


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe([*TINY, "train.epochs=3"])


def plan(processes: int = 1, accumulate: int = 1, steps_per_epoch: int = 3) -> Plan:
    phase = Phase(TrainRecipe(epochs=3), Schedule(0, 3 * steps_per_epoch, 0, 1.0), 0)
    return Plan(8 // processes // accumulate, accumulate, steps_per_epoch, (phase,))


def steps_of(
    rows: list[int], seed: int = 0, processes: int = 1, accumulate: int = 1, first: int = 0
) -> list[list[tuple[int, int]]]:
    """What all processes together take at each step."""
    taken: dict[int, list[tuple[int, int]]] = {}
    for rank in range(processes):
        order = TrainingOrder(rows, plan(processes, accumulate), seed, Group(rank, processes), first)
        batches = list(order)
        assert len(batches) == len(order)
        for number, batch in enumerate(batches):
            assert len(batch) == 8 // processes // accumulate
            taken.setdefault(first + number // accumulate, []).extend(batch)
    return [taken[step] for step in sorted(taken)]


def test_an_epoch_takes_each_image_once_in_an_order_of_seed_and_epoch() -> None:
    rows = list(range(10, 36))  # two are left over
    steps = steps_of(rows)
    epochs = [[row for step in steps[start : start + 3] for _, row in step] for start in (0, 3, 6)]
    assert all(max(Counter(epoch).values()) == 1 and set(epoch) <= set(rows) for epoch in epochs)
    assert [{epoch for epoch, _ in step} for step in steps] == [{0}] * 3 + [{1}] * 3 + [{2}] * 3
    assert epochs[0] != epochs[1]
    assert steps == steps_of(rows)
    assert steps != steps_of(rows, seed=1)


@pytest.mark.parametrize(("processes", "accumulate", "first"), [(2, 1, 0), (4, 2, 0), (1, 4, 0), (1, 1, 4), (2, 2, 5)])
def test_a_step_takes_the_same_images_whoever_shares_it_and_wherever_it_was_interrupted(
    processes: int, accumulate: int, first: int
) -> None:
    rows = list(range(26))
    whole = steps_of(rows)[first:]
    shared = steps_of(rows, processes=processes, accumulate=accumulate, first=first)
    assert [sorted(step) for step in shared] == [sorted(step) for step in whole]


def test_plan_refuses_what_cannot_be(recipe: Recipe) -> None:
    with pytest.raises(InputError, match="batch_size=4 does not divide among 3 processes"):
        Plan.of(recipe, 20, 3)
    with pytest.raises(InputError, match="batch_size=4 is more than the 3 training images"):
        Plan.of(recipe, 3, 1)


def test_rate_warms_up_and_falls_to_zero() -> None:
    schedule = Schedule(first=0, steps=100, warmup=10, peak=1.0)
    rates = [schedule.lr(step) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


def with_train(recipe: Recipe, **settings: object) -> Recipe:
    recipe.train = replace(recipe.train, **settings)  # type: ignore[arg-type]
    return recipe


def test_phases_follow_each_other(recipe: Recipe) -> None:
    assert not wants_masks(recipe)
    with_train(recipe, then=[PhaseRecipe(2, {"mse": 0.5, "mask": 1.0}), PhaseRecipe(1, {"cosine": 1})])
    assert [settings_in(recipe, epoch).loss for epoch in range(6)] == (
        [{"mse": 1.0}] * 3 + [{"mse": 0.5, "mask": 1.0}] * 2 + [{"cosine": 1}]
    )
    assert Plan.of(recipe, 20, 1).steps == 6 * 5
    assert wants_masks(recipe)
    assert not wants_masks(recipe, ("truth",))


def test_phases_that_say_nothing_of_rates_share_one_schedule(recipe: Recipe) -> None:
    """As before phases had schedules of their own."""
    with_train(recipe, lr=1.0, warmup_steps=2, then=[PhaseRecipe(2, {"mask": 1.0}, weight_decay=0.0)])
    plan, whole = Plan.of(recipe, 20, 1), Schedule(0, 25, 2, 1.0)
    assert [plan.lr(step) for step in range(25)] == [whole.lr(step) for step in range(25)]
    assert [plan.phase(step).settings.weight_decay for step in (14, 15)] == [0.05, 0.0]
    assert [phase.begins_anew for phase in plan.phases] == [True, False]


def test_a_phase_has_a_schedule_of_its_own_where_it_says_so(recipe: Recipe) -> None:
    phase = PhaseRecipe(2, {"mask": 1.0}, lr=0.1, lr_end=0.01, warmup_steps=0, clip_norm=0.01, mask_points=1.0)
    after = PhaseRecipe(1, {"mse": 1.0})
    with_train(recipe, lr=1.0, warmup_steps=3, then=[phase, after])
    plan = Plan.of(recipe, 40, 1)
    assert [phase.first for phase in plan.phases] == [0, 30, 50]
    first, second = Schedule(0, 30, 3, 1.0), Schedule(30, 30, 0, 0.1, 0.01)
    assert [plan.lr(step) for step in range(60)] == (
        [first.lr(step) for step in range(30)] + [second.lr(step) for step in range(30, 60)]
    )
    assert plan.lr(30) == 0.1
    assert plan.lr(59) == pytest.approx(0.01, abs=3e-4)
    assert [phase.begins_anew for phase in plan.phases] == [True, True, False]
    settings = plan.phase(30).settings
    assert (settings.clip_norm, settings.mask_points, settings.mask_prompts) == (0.01, 1.0, recipe.train.mask_prompts)
    assert plan.phase(50).settings.clip_norm == recipe.train.clip_norm


def test_rates_are_for_a_batch_and_scaled_for_another(recipe: Recipe) -> None:
    phase = PhaseRecipe(1, lr=0.2, lr_per=2, warmup_epochs=0.5)
    with_train(recipe, lr=0.8, lr_end=0.08, lr_per=16, warmup_epochs=1.0, then=[phase])  # TINY's batch is 4
    first, second = Plan.of(recipe, 40, 2).phases
    assert (first.schedule.peak, first.schedule.end) == pytest.approx((0.2, 0.02))
    assert first.schedule.warmup == 10  # of 30 steps: epochs are not held to a tenth
    assert (second.schedule.peak, second.schedule.end) == pytest.approx((0.4, 0.16))
    assert second.schedule.warmup == 5
    lines = list(Plan.of(recipe, 40, 2).describe())
    assert lines[0] == (
        "phase 1 of 2: 3 epochs, 30 steps, 1 mse; learning rate up to 0.2 in 10 steps, down to 0.02 "
        "(0.8 is for a batch of 16, this one is 4)"
    )


def test_what_a_phase_says_of_warm_up_counts_and_half_of_it_decays(recipe: Recipe) -> None:
    said, silent = PhaseRecipe(2, lr=0.1, warmup_steps=1), PhaseRecipe(2, lr=0.1)
    with_train(recipe, warmup_epochs=3.0, then=[said, silent])
    assert [phase.schedule.warmup for phase in Plan.of(recipe, 40, 1).phases] == [15, 1, 10]


@pytest.mark.parametrize("prefix", [True, False])
def test_schedules_are_timms(prefix: bool) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=35 if prefix else 40,  # with a prefix timm counts without it
        lr_min=0.01,
        warmup_t=5,
        warmup_lr_init=0.5 / 6,
        warmup_prefix=prefix,
        t_in_epochs=False,
    )
    ours = Schedule(100, 40, 5, 0.5, 0.01, prefix)
    for step in range(40):
        scheduler.step_update(step)
        assert ours.lr(100 + step) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_a_run_may_begin_with_a_later_phase(recipe: Recipe) -> None:
    plan = Plan.of(with_train(recipe, epochs=0, then=[PhaseRecipe(2, {"mask": 1.0}, lr=0.5)]), 20, 1)
    assert plan.steps == 10
    assert plan.phase(0).settings.loss == {"mask": 1.0}
    assert plan.phase(0).begins_anew
    assert len(list(plan.describe())) == 1
