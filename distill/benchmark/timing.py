"""Timing that can be trusted on a machine whose speed drifts: in turns, and as ratios of what was measured together."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import t as student_t

from embeddings_cache.system import bar

CONFIDENCE = 0.95
"""Of the intervals of ratios."""

NO_RATIO: dict[str, float | None] = {"ratio": None, "ratio_low": None, "ratio_high": None}

Subject = Callable[[], list[float]]
"""Works, and returns the seconds of each run that counts; none where it can work no more."""

Pair = tuple[float, float]
"""Seconds of the baseline and of a subject, of neighbouring turns."""


@dataclass
class Measured:
    """Of one subject, a list for each launch of its process; what is measured in this process has one launch.

    `seconds` has every run that counts; `pairs` one entry a round, of the medians of two neighbouring turns.
    """

    seconds: list[list[float]] = field(default_factory=lambda: [[]])
    pairs: list[list[Pair]] = field(default_factory=lambda: [[]])

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(second for launch in self.seconds for second in launch)

    @property
    def speed_up(self) -> float:
        """How many times as fast as the baseline."""
        value = ratio(self.pairs)["ratio"]
        return round(1 / value, 4) if value else math.nan

    def as_json(self, parts: int = 1) -> dict[str, Any]:
        """Milliseconds of one of so many equal parts of a run, and the ratio to the baseline.

        Returns:
            `median_ms`, `p10_ms`, `p90_ms`, `ratio`, `ratio_low`, `ratio_high`; and all that these are made of,
            `samples_ms` and `pairs_ms`, of whole runs and with a list for each launch.
        """
        return {
            **spread([second / parts for launch in self.seconds for second in launch]),
            **ratio(self.pairs),
            "samples_ms": in_ms(self.seconds),
            "pairs_ms": [in_ms(launch) for launch in self.pairs],
        }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile in milliseconds, as the report shows them."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "median_ms": round(1e3 * statistics.median(ordered), 3),
        "p10_ms": round(1e3 * ordered[round(0.1 * last)], 3),
        "p90_ms": round(1e3 * ordered[round(0.9 * last)], 3),
    }


def log_ratios(launches: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """Logarithms of subject / baseline that are independent of each other: a process is faster or slower than the next
    one of the same program as a whole, so each launch gives one; where there was only one, each pair does."""
    logs = [[math.log(own / baseline) for baseline, own in launch] for launch in launches if launch]
    return (
        [statistics.fmean(launch) for launch in logs] if len(logs) > 1 else [log for launch in logs for log in launch]
    )


def ratio(launches: Sequence[Sequence[Sequence[float]]]) -> dict[str, float | None]:
    """The subject's time over the baseline's, from pairs, with Student's interval of the mean of their logarithms.

    Returns:
        `ratio`, `ratio_low` and `ratio_high`; None where there is nothing to tell them from.
    """
    logs = log_ratios(launches)
    if not logs:
        return NO_RATIO
    mean, half = statistics.fmean(logs), half_width(logs)
    low, high = (None, None) if half is None else (round(math.exp(mean - half), 4), round(math.exp(mean + half), 4))
    return {"ratio": round(math.exp(mean), 4), "ratio_low": low, "ratio_high": high}


def half_width(values: Sequence[float]) -> float | None:
    """Half of Student's interval of a mean; None of fewer than two values."""
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return error * float(student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))


def timed(run: Callable[[], object], device: torch.device) -> Subject:
    """Something that is called once a turn, and whose work on a GPU is waited for."""

    def turn() -> list[float]:
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        return [time.perf_counter() - started]

    return turn


def interleave(
    subjects: Mapping[str, Subject], rounds: int, baseline: str, warm_up: bool = True, before: int = 0
) -> dict[str, Measured]:
    """Measure subjects in turns, each beside a turn of the baseline.

    So a machine that becomes slower or faster meanwhile is slower or faster for both of a pair, and their ratio means
    something.

    Args:
        subjects: by name.
        rounds: turns of each that count; the baseline has more.
        baseline: the name of one.
        warm_up: give each a turn before the first round.
        before: rounds of earlier launches; the order goes on from theirs.
    """
    measured = {name: Measured() for name in subjects}
    order = [turns(list(subjects), baseline, before + number) for number in range(rounds)]
    total = sum(len(group) for groups in order for group in groups) + warm_up * len(subjects)
    with bar(total=total, unit=" turns", leave=False) as progress:

        def take(name: str) -> list[float]:
            progress.set_description(name)
            seconds = subjects[name]()
            progress.update()
            return seconds

        for name in subjects if warm_up else ():
            take(name)
        for group in (group for groups in order for group in groups):
            taken = {name: take(name) for name in group}
            for name, seconds in taken.items():
                measured[name].seconds[0] += seconds
                if seconds and taken[baseline]:
                    pair = statistics.median(taken[baseline]), statistics.median(seconds)
                    measured[name].pairs[0].append(pair)
    return measured


def turns(names: Sequence[str], baseline: str, number: int) -> list[list[str]]:
    """Who has a turn when in a round: groups of the baseline and one or two others, before and after it.

    The order turns from round to round, so that nobody is always behind the same neighbour.
    """
    others = [name for name in names if name != baseline]
    if not others:
        return [[baseline]]
    shift = number % len(others)
    others = others[shift:] + others[:shift]
    groups = []
    for first, *second in (others[place : place + 2] for place in range(0, len(others), 2)):
        group = [first, baseline, *second]
        groups.append(group if number % 2 == 0 else group[::-1])
    return groups


def in_ms(launches: Sequence[Sequence[float]]) -> list[list[float]]:
    """Seconds as milliseconds, for JSON."""
    return [[round(1e3 * second, 4) for second in launch] for launch in launches]


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to be done; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
