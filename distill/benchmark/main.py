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
from distill.benchmark.compare import compare, machines_differ
from distill.benchmark.contenders import SUFFIXES
from distill.benchmark.evaluate import EvaluateBenchmark, benchmark_evaluate
from distill.benchmark.exports import hand_over
from distill.benchmark.gpu import GpuBenchmark, benchmark_gpu
from distill.benchmark.pipeline import PipelineBenchmark, benchmark_pipeline
from distill.benchmark.plot import draw_students
from distill.benchmark.serve import ServeBenchmark, benchmark_serve
from distill.benchmark.students import QUICK, StudentsBenchmark, benchmark_students
from distill.benchmark.tables import (
    as_markdown,
    as_text,
    changes_table,
    describe_machine,
    notes,
    plain_table,
    published_table,
    students_table,
)
from distill.benchmark.teacher import TeacherBenchmark, benchmark_teacher
from distill.benchmark.train import TrainBenchmark, benchmark_train
from distill.checks import nearest
from embeddings_cache.system import read_json, whole_file, write_json
from students import InputError, first_line

USAGE = """\
python benchmark.py BENCHMARK [key=value ...]
python benchmark.py students [CONTENDER ...] [--quick] [key=value ...]
python benchmark.py compare BEFORE.json AFTER.json

Measure what things cost: each beside its baseline, in turns, in one run. A contender is a student or one of SAM's
encoders (repvit_m0_9, repvit_m1-fuse, tiny_vit_5m, vit_b, ...), several of them (recipes, students, sam), a checkpoint
(.safetensors, .pt, .pth), an exported file (.onnx, .mlpackage), or a run directory, whose exported encoders are
measured and described with what came out. --quick is a minute's answer. Every sample goes to benchmark.json, the
tables to benchmark.md. `compare` tells what changed beyond noise."""

KINDS: dict[str, tuple[Any, Callable[[Any], dict[str, Any]], str]] = {
    "students": (StudentsBenchmark, benchmark_students, "encoders on backends: latency, memory, size, fidelity"),
    "teacher": (TeacherBenchmark, benchmark_teacher, "the teacher's encoder against segment-anything's own"),
    "train": (TrainBenchmark, benchmark_train, "a training step: precisions, memory formats, reading the cache"),
    "pipeline": (PipelineBenchmark, benchmark_pipeline, "photographs from JPEG to shard, by number of workers"),
    "evaluate": (EvaluateBenchmark, benchmark_evaluate, "photographs with many masks, as stage=evaluate takes them"),
    "gpu": (GpuBenchmark, benchmark_gpu, "teacher, pipeline, training and evaluation on a GPU, in one run"),
    "cache": (CacheBenchmark, benchmark_cache, "reading embeddings against np.memmap, and opening a large cache"),
    "serve": (ServeBenchmark, benchmark_serve, "a server under load: clicks of many clients, each mask compared"),
}


def main(arguments: list[str]) -> int:
    """Run a benchmark, print its table, put it into `benchmark.json`; the exit code is 2 after one line on stderr, and
    130 after Ctrl-C."""
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        print(help_text())
        return 0
    try:
        if arguments[0] == "compare":
            return tell_changes(arguments[1:])
        kind, settings = parse(arguments)
        out = Path(settings.out)
        others = read_json(out) if out.exists() else {}
        if not isinstance(others, dict):
            raise InputError(f"out={out} is there, and is no benchmark.json")
        content = KINDS[kind][1](settings)
    except InputError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(as_text(students_table(content["rows"]) if kind == "students" else plain_table(content["rows"])))
    for line in notes(content):
        print(line)
    if published := content.get("published"):
        print(f"\npublished by others, not measured here\n{as_text(published_table(published))}\n")
    for key, value in content.items():
        if isinstance(value, int | float):
            print(f"{key}: {value}")
    written = write_results(out, {**others, kind: content})
    try:
        written += hand_over(settings.contenders, content) if kind == "students" else []
    except (InputError, OSError) as error:
        print(f"-> {', '.join(map(str, written))}")
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    print(f"-> {', '.join(map(str, written))}")
    return 130 if content.get("interrupted") else 0


def write_results(out: Path, contents: dict[str, Any]) -> list[Path]:
    """All benchmarks that a file has, as JSON, as Markdown and, of students, as a picture beside it."""
    write_json(out, contents)
    page = out.with_suffix(".md")
    with whole_file(page) as temporary:
        temporary.write_text(markdown(contents), encoding="utf-8")
    students = contents.get("students")
    pictures = draw_students(students["rows"], out) if isinstance(students, dict) else []
    return [out, page, *pictures]


def markdown(contents: dict[str, Any]) -> str:
    """A page with a section for each benchmark."""
    parts = ["# Benchmark"]
    for kind, content in contents.items():
        if not isinstance(content, dict) or "rows" not in content:
            continue
        rows = content["rows"]
        parts += [f"## {kind}", describe_machine(content["machine"]) + "."]
        parts.append(as_markdown(students_table(rows) if kind == "students" else plain_table(rows)))
        if lines := notes(content):
            parts.append("\n".join(f"- {line}" for line in lines))
        if published := content.get("published"):
            parts += ["Published by others, not measured here:", as_markdown(published_table(published))]
    return "\n\n".join(parts) + "\n"


def tell_changes(arguments: list[str]) -> int:
    """`compare`: a table of what changed.

    Raises:
        InputError: not two files with benchmarks.
    """
    if len(arguments) != 2:
        raise InputError("compare takes two files: python benchmark.py compare BEFORE.json AFTER.json")
    before, after = map(Path, arguments)
    rows = compare(before, after)
    print(as_text(changes_table(rows)))
    changed = [row for row in rows if row["verdict"] in ("slower", "faster")]
    print(f"{len(changed)} of {len(rows)} rows changed beyond noise, in relation to their baseline (99 % interval)")
    for line in machines_differ(before, after):
        print(f"{line}: times of the two files are not those of one machine")
    return 0


def parse(arguments: list[str]) -> tuple[str, Any]:
    """`teacher rounds=3` → `"teacher"`, `TeacherBenchmark(rounds=3)`.

    Raises:
        InputError: an unknown benchmark, key or value.
    """
    kind, *words = arguments
    if kind not in KINDS:
        raise InputError(f"{kind!r} is no benchmark{nearest(kind, KINDS)}")
    schema = KINDS[kind][0]
    keys = [entry.name for entry in fields(schema)]
    quick: tuple[str, ...] = ()
    names, overrides = [], []
    for word in words:
        key, equals, _ = word.partition("=")
        if equals and key in keys and key != "contenders":
            overrides.append(word)
        elif kind == "students" and word == "--quick":
            quick = QUICK
        elif kind == "students" and (not equals or Path(word).suffix in SUFFIXES):
            names.append(word)
        else:
            raise InputError(f"{word!r} is no key=value of {kind}{nearest(key, keys)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist([*quick, *overrides]))
    except OmegaConfBaseException as error:
        raise InputError(first_line(error)) from error
    settings: Any = OmegaConf.to_object(merged)
    if names:
        settings.contenders = names
    if (suffix := Path(settings.out).suffix) in (".md", ".png", ".svg"):
        raise InputError(f"out={settings.out}: the numbers are JSON, and {suffix} is for what lies beside them")
    for key, value in vars(settings).items():
        least = 0 if key in ("pipeline", "decoder_runs") else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise InputError(f"{key}={value} is less than {least}")
    return kind, settings


def help_text() -> str:
    """Every benchmark with its keys, their defaults and what they are."""
    lines = [USAGE, ""]
    for kind, (schema, _, summary) in KINDS.items():
        lines.append(f"{kind}: {summary}")
        comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(schema), re.MULTILINE))
        defaults = schema()
        for entry in fields(schema):
            default = getattr(defaults, entry.name)
            if isinstance(default, list):
                default = ",".join(default)
            shown = {"None": "null", "True": "true", "False": "false"}.get(str(default), default)
            lines.append(f"  {f'{entry.name}={shown}':<34} {comments[entry.name]}")
        lines.append("")
    return "\n".join(lines).rstrip()
