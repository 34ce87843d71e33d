"""Two `benchmark.json` side by side: what changed beyond noise."""

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from distill.benchmark.machine import TOOLS
from distill.benchmark.timing import log_ratios
from embeddings_cache.system import read_json
from students import InputError

CERTAIN = 0.99
"""Of the intervals that decide; with 0.95 one row of twenty would seem changed."""

COUNTED = {"parameters": "parameters", "macs": "multiply-accumulates", "file_bytes": "bytes of the file"}
"""What is equal unless the contender is another."""

MEMORY = 0.05
"""Share by which the peak memory of two runs of the same differs."""

MIOU = 0.001

MACHINE = ("device", "gpu", "threads", "torch", "system")
"""What of the machine makes times those of another one."""


def compare(before: Path, after: Path) -> list[dict[str, Any]]:
    """Rows of both files, matched by benchmark, contender and backend.

    Returns:
        For each row that is in either: `verdict`, the change of the time in relation to the baseline (`change`,
        `change_low`, `change_high`: 1.1 is ten percent slower), the medians, and `other`, what else differs.

    Raises:
        InputError: a file is missing, or no benchmark.
    """
    contents = [_read(path) for path in (before, after)]
    compared = []
    for kind in contents[0] | contents[1]:
        parts = [content.get(kind, {}) for content in contents]
        if not all(parts):
            continue
        same_baseline = parts[0].get("baseline") == parts[1].get("baseline")
        rows = [{(row["name"], row["backend"]): row for row in part["rows"]} for part in parts]
        for key in rows[0] | rows[1]:
            pair = [of_file.get(key, {}) for of_file in rows]
            about = {"benchmark": kind, "name": key[0], "backend": key[1]}
            compared.append({**about, **_compare_rows(pair[0], pair[1], same_baseline)})
    if not compared:
        raise InputError(f"{before} and {after} have no benchmark in common")
    return compared


def machines_differ(before: Path, after: Path) -> list[str]:
    """What is another machine or another version, a line each; then only ratios can be compared."""
    contents = [_read(path) for path in (before, after)]
    lines = []
    for kind in contents[0]:
        parts = [content.get(kind, {}) for content in contents]
        told = [{**_of(part, "machine"), **_of(part, "machine", "versions"), **_of(part, "settings")} for part in parts]
        for key in (*MACHINE, *TOOLS, "image_size"):
            first, second = (each.get(key) for each in told)
            if first is not None and second is not None and first != second:
                lines.append(f"{kind}: {key} was {first}, is {second}")
    return lines


def _of(content: Any, *keys: str) -> dict[str, Any]:
    for key in keys:
        content = content.get(key, {})
    return content


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} is no benchmark.json")
    return {kind: part for kind, part in content.items() if isinstance(part, dict) and "rows" in part}


def _compare_rows(before: dict[str, Any], after: dict[str, Any], same_baseline: bool) -> dict[str, Any]:
    if not before or not after:
        return {"verdict": "new" if after else "gone"}
    failed = [row.get("reason") for row in (before, after)]
    medians = {"before_ms": before.get("median_ms"), "after_ms": after.get("median_ms")}
    if any(failed):
        verdict = "fails in both" if all(failed) else f"fails now: {failed[1]}" if failed[1] else "failed before"
        return {"verdict": verdict, **medians}
    other = "; ".join(_other(before, after))
    if not same_baseline:
        return {"verdict": "another baseline", **medians, "other": other}
    logs = [log_ratios(row.get("pairs_ms", [])) for row in (before, after)]
    if not all(any(values) for values in logs):  # its own baseline, or from before pairs were kept
        return {"verdict": "no ratio", **medians, "other": other}
    change = statistics.fmean(logs[1]) - statistics.fmean(logs[0])
    once = any(len(row["pairs_ms"]) < 2 for row in (before, after))
    half = None if once else _welch(*logs)
    verdict = "cannot be told: one launch" if once else "cannot be told"
    result: dict[str, Any] = {"verdict": verdict, **medians, "change": round(math.exp(change), 4)}
    if half is not None:
        low, high = math.exp(change - half), math.exp(change + half)
        result |= {"change_low": round(low, 4), "change_high": round(high, 4)}
        result["verdict"] = "slower" if low > 1 else "faster" if high < 1 else "same within noise"
    return {**result, "other": other}


def _other(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for key, words in COUNTED.items():
        if before.get(key) != after.get(key):
            yield f"{words} {_text(before.get(key))} → {_text(after.get(key))}"
    was, now = before.get("peak_memory_bytes"), after.get("peak_memory_bytes")
    if was and now and abs(now / was - 1) > MEMORY:
        yield f"peak memory {was / 1e6:.0f} → {now / 1e6:.0f} MB"
    for prompt in ("point", "box"):
        was, now = before.get(f"miou_{prompt}"), after.get(f"miou_{prompt}")
        if was is not None and now is not None and abs(now - was) > MIOU:
            yield f"mIoU by {prompt} {was:.3f} → {now:.3f}"


def _text(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _welch(first: list[float], second: list[float]) -> float | None:
    """Half of the interval of the difference of two means whose variances differ (Welch, Biometrika 34, 1947); None
    where one has a single value."""
    if min(len(first), len(second)) < 2:
        return None
    errors = [statistics.variance(values) / len(values) for values in (first, second)]
    if not any(errors):
        return 0.0
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(values) - 1) for error, values in zip(errors, (first, second), strict=True)
    )
    return math.sqrt(sum(errors)) * float(student_t.ppf((1 + CERTAIN) / 2, freedom))
