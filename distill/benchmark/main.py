"""The command line of `benchmark.py`: what to measure, and `key=value`."""

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.benchmark.cache import CacheBenchmark, benchmark_cache
from distill.benchmark.teacher import TeacherBenchmark, benchmark_teacher
from distill.benchmark.train import TrainBenchmark, benchmark_train
from distill.checks import nearest
from embeddings_cache.files import read_json, write_json
from students import InputError, first_line

KINDS: dict[str, tuple[Any, Callable[[Any], dict[str, Any]], str]] = {
    "teacher": (TeacherBenchmark, benchmark_teacher, "the teacher's encoder against segment-anything's own"),
    "train": (TrainBenchmark, benchmark_train, "a training step: precisions, memory formats, reading the cache"),
    "cache": (CacheBenchmark, benchmark_cache, "reading embeddings against np.memmap, and opening a large cache"),
}


def main(arguments: list[str]) -> int:
    """Run a benchmark, print its table, put it into `benchmark.json`; the exit code is 2 after one line on stderr."""
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        print(help_text())
        return 0
    try:
        kind, settings = parse(arguments)
        out = Path(settings.out)
        others = read_json(out) if out.exists() else {}
        if not isinstance(others, dict):
            raise InputError(f"out={out} is there, and is no benchmark.json")
        content = KINDS[kind][1](settings)
    except InputError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    print(table(content["rows"]))
    for key, value in content.items():
        if isinstance(value, int | float | str):
            print(f"{key}: {value}")
    write_json(out, {**others, kind: content})
    print(f"-> {out}")
    return 0


def parse(arguments: list[str]) -> tuple[str, Any]:
    """`teacher rounds=3` → `"teacher"`, `TeacherBenchmark(rounds=3)`.

    Raises:
        InputError: an unknown benchmark, key or value.
    """
    kind, *overrides = arguments
    if kind not in KINDS:
        raise InputError(f"{kind!r} is no benchmark{nearest(kind, KINDS)}")
    schema = KINDS[kind][0]
    keys = [entry.name for entry in fields(schema)]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or key not in keys:
            raise InputError(f"{override!r} is no key=value of {kind}{nearest(key, keys)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(overrides))
    except OmegaConfBaseException as error:
        raise InputError(first_line(error)) from error
    settings = OmegaConf.to_object(merged)
    for key, value in vars(settings).items():
        least = 0 if key == "pipeline" else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise InputError(f"{key}={value} is less than {least}")
    return kind, settings


def help_text() -> str:
    """Every benchmark with its keys, their defaults and what they are."""
    lines = ["python benchmark.py BENCHMARK [key=value ...]", ""]
    for kind, (schema, _, summary) in KINDS.items():
        lines.append(f"{kind}: {summary}")
        comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(schema), re.MULTILINE))
        defaults = schema()
        for entry in fields(schema):
            default = getattr(defaults, entry.name)
            shown = {"None": "null", "True": "true", "False": "false"}.get(str(default), default)
            lines.append(f"  {f'{entry.name}={shown}':<34} {comments[entry.name]}")
        lines.append("")
    return "\n".join(lines).rstrip()


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text, a column for each key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_shown(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
