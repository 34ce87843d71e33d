import math
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from distill.benchmark.timing import Measured, interleave, ratio, spread, turns


def test_each_has_a_turn_a_round_beside_the_baseline() -> None:
    names = ["a", "base", "b", "c"]
    before: Counter[str] = Counter()
    for number in range(6):
        groups = turns(names, "base", number)
        assert sorted(name for group in groups for name in group if name != "base") == ["a", "b", "c"]
        for group in groups:
            assert group.count("base") == 1
            assert len(group) <= 3
            before.update(group[: group.index("base")])
    assert min(before[name] for name in "abc") > 0
    assert max(before[name] for name in "abc") < 6
    assert turns(["base"], "base", 0) == [["base"]]


def test_a_ratio_survives_a_machine_that_becomes_three_times_slower() -> None:
    clock = 0.0

    def subject(work: float) -> Callable[[], list[float]]:
        def turn() -> list[float]:
            nonlocal clock
            seconds = work * (1 + clock / 50)
            clock += seconds
            return [seconds]

        return turn

    subjects = {"base": subject(1.0), "twin": subject(1.0), "slow": subject(3.0), "fast": subject(0.2)}
    measured = interleave(subjects, rounds=12, baseline="base")
    assert clock > 100
    seconds = measured["base"].seconds[0]
    assert max(seconds) > 2.5 * min(seconds)
    for name, work in (("twin", 1.0), ("slow", 3.0), ("fast", 0.2)):
        found = ratio(measured[name].pairs)
        assert found["ratio"] == pytest.approx(work, rel=0.02)
        assert found["ratio_low"] <= work <= found["ratio_high"]
    assert measured["slow"].speed_up == pytest.approx(1 / 3, rel=0.02)


def test_the_first_turn_does_not_count() -> None:
    called: list[str] = []

    def subject(name: str) -> Callable[[], list[float]]:
        return lambda: called.append(name) or [float(called.count(name))]

    measured = interleave({"a": subject("a"), "b": subject("b")}, rounds=2, baseline="a")
    assert measured["a"].seconds == [[2.0, 3.0]]
    assert measured["b"].pairs == [[(2.0, 2.0), (3.0, 3.0)]]


def test_the_order_goes_on_from_launch_to_launch() -> None:
    called: list[str] = []
    subjects = {name: (lambda name=name: called.append(name) or [1.0]) for name in "abcd"}
    interleave(subjects, rounds=4, baseline="a", warm_up=False)
    at_once, called = called, []
    for launch in range(4):
        interleave(subjects, rounds=1, baseline="a", warm_up=False, before=launch)
    assert called == at_once
    first_of_each = [at_once[place] for place in range(0, len(at_once), len(at_once) // 4)]
    assert len(set(first_of_each)) > 1


def test_what_gets_lost_costs_nothing_but_its_own_pairs() -> None:
    def lost() -> list[float]:
        return []

    measured = interleave({"a": lambda: [1.0], "b": lost, "c": lambda: [2.0]}, rounds=2, baseline="a")
    assert measured["b"].pairs == measured["b"].seconds == [[]]
    assert ratio(measured["c"].pairs)["ratio"] == 2
    without = interleave({"a": lost, "c": lambda: [2.0]}, rounds=2, baseline="a")["c"]
    assert without.median == 2
    assert ratio(without.pairs) == {"ratio": None, "ratio_low": None, "ratio_high": None}


def test_the_interval_is_students() -> None:
    rng = np.random.default_rng(0)
    pairs = [(1.0, math.exp(value)) for value in rng.normal(0.3, 0.1, 7)]
    expected = stats.ttest_1samp([math.log(own) for _, own in pairs], 0).confidence_interval(0.95)
    found = ratio([pairs])
    assert (math.log(found["ratio_low"]), math.log(found["ratio_high"])) == pytest.approx(expected, abs=1e-4)
    assert ratio([pairs[:1]])["ratio_low"] is None


def test_an_interval_of_launches_holds_the_truth_where_processes_differ() -> None:
    """A process that is 2 % slower as a whole is not averaged out by more rounds of it."""
    rng = random.Random(0)
    held = {"launches": 0, "as one": 0}
    for _ in range(400):
        launches = []
        for _ in range(5):
            bias = rng.gauss(0, 0.02)
            launches.append([(1.0, 1.5 * math.exp(bias + rng.gauss(0, 0.005))) for _ in range(4)])
        as_one = [[pair for launch in launches for pair in launch]]
        for name, pairs in (("launches", launches), ("as one", as_one)):
            found = ratio(pairs)
            held[name] += found["ratio_low"] <= 1.5 <= found["ratio_high"]
    assert held["launches"] / 400 == pytest.approx(0.95, abs=0.03)
    assert held["as one"] / 400 < 0.8


def test_json_has_all_samples() -> None:
    measured = Measured([[1.0, 2.0], [3.0, 6.0]], [[(1.0, 1.5)], [(3.0, 4.5)]])
    as_json = measured.as_json(parts=2)
    assert as_json["median_ms"] == 1250
    assert as_json["samples_ms"] == [[1000, 2000], [3000, 6000]]
    assert as_json["pairs_ms"] == [[[1000, 1500]], [[3000, 4500]]]
    assert as_json["ratio"] == as_json["ratio_low"] == as_json["ratio_high"] == 1.5


def test_spread() -> None:
    values = list(range(11))
    random.Random(0).shuffle(values)
    assert spread([value / 1e3 for value in values]) == {"median_ms": 5, "p10_ms": 1, "p90_ms": 9}
