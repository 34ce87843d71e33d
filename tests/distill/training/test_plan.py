"""When what happens, and which images a step takes."""

from collections import Counter
from dataclasses import replace

import pytest

from distill.recipe import Recipe, load_recipe
from distill.schema import PhaseRecipe
from distill.training.batches import TrainingOrder
from distill.training.plan import Plan, loss_weights, wants_masks
from distill.training.rows import Group
from students import InputError
from support import TINY


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe([*TINY, "train.epochs=3"])


def plan(processes: int = 1, accumulate: int = 1, steps_per_epoch: int = 3) -> Plan:
    return Plan(8 // processes // accumulate, accumulate, steps_per_epoch, 3 * steps_per_epoch, 0, 1.0)


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
    plan = Plan(micro_batch=1, accumulate=1, steps_per_epoch=10, steps=100, warmup=10, peak_lr=1.0)
    rates = [plan.lr(step) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_phases_follow_each_other(recipe: Recipe) -> None:
    assert not wants_masks(recipe)
    recipe.train = replace(
        recipe.train, then=[PhaseRecipe(2, {"mse": 0.5, "mask": 1.0}), PhaseRecipe(1, {"cosine": 1})]
    )
    assert [loss_weights(recipe, epoch) for epoch in range(6)] == (
        [{"mse": 1.0}] * 3 + [{"mse": 0.5, "mask": 1.0}] * 2 + [{"cosine": 1}]
    )
    assert Plan.of(recipe, 20, 1).steps == 6 * 5
    assert wants_masks(recipe)
