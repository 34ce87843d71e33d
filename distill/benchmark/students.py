"""What each student costs: latency, memory, size and fidelity of any encoders on any backends, beside each other."""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from distill.benchmark.backends import BACKENDS, MINUTES
from distill.benchmark.contenders import Contender, find_contenders
from distill.benchmark.machine import machine
from distill.benchmark.published import PUBLISHED_LATENCIES
from distill.benchmark.timing import Measured, in_ms, interleave, spread
from distill.benchmark.worker import Lost, Worker, describe, prepare, serve
from distill.checks import nearest
from distill.export.files import size as file_size
from embeddings_cache.system import available_cores, bar
from students import InputError

QUICK = ("backends=eager", "launches=1", "rounds=3", "turn_seconds=1", "decoder_runs=0", "batches=0")
"""What `--quick` stands for; what else is on the command line counts more."""


@dataclass
class StudentsBenchmark:
    contenders: list[str] = field(default_factory=lambda: ["recipes"])  # or without a key: names, files, groups
    backends: str = "auto"  # after commas; auto: all that can run here, but for compiled; all: with the reason why not
    baseline: str | None = None  # CONTENDER or CONTENDER:BACKEND that ratios are to; default: the first that runs
    image_size: int = 1024  # of students that go by a name: side of the square input in pixels
    launches: int = 5  # times that each contender's process is started anew; the ratio's interval comes from them
    rounds: int = 3  # turns of each in a launch
    turn_seconds: float = 2.0  # what a turn takes at least, so that one of a fast encoder has several runs
    batches: str = "1,2,4"  # after commas: images at once that are tried for images/s; 0: none
    decoder_runs: int = 10  # of each decoder, in each launch
    threads: int | None = None  # and cores of each contender; default: all
    patience: float = 600.0  # seconds after which a contender that does not answer is given up
    out: str = "benchmark.json"  # where the numbers go; .md, .png and .svg beside it


@dataclass
class Entry:
    """A row in the making: a contender on a backend, what is known of it, and why it stopped."""

    contender: Contender
    backend: str
    folder: Path
    known: dict[str, Any] = field(default_factory=dict)
    measured: Measured = field(default_factory=lambda: Measured([], []))
    decoder: list[list[float]] = field(default_factory=list)
    reason: str | None = None

    @property
    def name(self) -> str:
        return f"{self.contender.label}:{self.backend}"

    def row(self) -> dict[str, Any]:
        """As `benchmark.json` has it; `reason` says why there are no times: it ran no further, or never."""
        times = self.measured.as_json() if any(self.measured.seconds) and not self.reason else {}
        decoder = [second for launch in self.decoder for second in launch]
        return {
            "name": self.contender.label,
            "backend": self.backend,
            **self.known,
            **times,
            **({f"decoder_{key}": value for key, value in spread(decoder).items()} if decoder else {}),
            "decoder_samples_ms": in_ms(self.decoder),
            "reason": self.reason,
        }


def benchmark_students(settings: StudentsBenchmark) -> dict[str, Any]:
    """Measure, and return what goes to `benchmark.json`; where Ctrl-C ends it, that of the launches that are finished.

    Raises:
        InputError: a setting that makes no sense.
        KeyboardInterrupt: none is finished.
    """
    batches = numbers_in(settings.batches)
    contenders = find_contenders(settings.contenders, settings.image_size)
    threads = settings.threads or available_cores()
    with TemporaryDirectory(prefix="students-benchmark-") as scratch:
        entries, not_here = plan(contenders, settings.backends.split(","), Path(scratch))
        baseline = find_baseline(entries, settings.baseline)
        describe_all(entries, settings.patience)
        prepare_all(entries, settings.patience)
        interrupted = None
        for number in range(settings.launches):
            try:
                baseline = launch(entries, baseline, settings, threads, number)
            except KeyboardInterrupt:
                if not number:
                    raise
                interrupted = f"interrupted after {number} of {settings.launches} launches"
                break
        for entry in entries if interrupted and batches else ():
            entry.known.setdefault("batch_reason", "interrupted")
    return {
        "settings": vars(settings),
        "interrupted": interrupted,
        "machine": machine(torch.device("cpu"), threads),
        "baseline": baseline.name if baseline else None,
        "rows": [entry.row() for entry in entries],
        "not_here": not_here,
        "published": PUBLISHED_LATENCIES,
    }


def plan(contenders: list[Contender], asked: list[str], scratch: Path) -> tuple[list[Entry], dict[str, str]]:
    """Every contender on every backend that is asked for and runs its kind; and with `auto`, which backends are not
    here and why.

    A file that none of them runs gets the first that would.

    Raises:
        InputError: an unknown backend.
    """
    for name in asked:
        if name not in (*BACKENDS, "auto", "all"):
            raise InputError(f"backends={name} is not known{nearest(name, (*BACKENDS, 'auto', 'all'))}")
    missing = {name: reason for name, backend in BACKENDS.items() if (reason := backend.missing())}
    wanted = [
        name
        for name in BACKENDS
        if name in asked or "all" in asked or ("auto" in asked and name not in missing and name not in MINUTES)
    ]
    sources = list(dict.fromkeys(contender.source for contender in contenders))
    entries = []
    for contender in contenders:
        fitting = [name for name in wanted if contender.kind in BACKENDS[name].kinds]
        if not fitting:
            runs = [name for name, backend in BACKENDS.items() if contender.kind in backend.kinds]
            here = [name for name in runs if name not in missing]
            fitting = here[:1] or runs[:1]
        for name in fitting:
            # One that comes twice shares its files, and so do backends that make the same of it.
            make = BACKENDS[name].prepare
            folder = scratch / f"{sources.index(contender.source)}-{make.__name__ if make else 'none'}"
            folder.mkdir(exist_ok=True)
            entries.append(Entry(contender, name, folder, reason=missing.get(name)))
    return entries, missing if "auto" in asked else {}


def find_baseline(entries: list[Entry], name: str | None) -> Entry | None:
    """The row that ratios are to; None without a name, for the first that turns out to run.

    Raises:
        InputError: there is none of this name.
    """
    for entry in entries if name else ():
        if name in (entry.name, entry.contender.label):
            return entry
    if name is None:
        return None
    names = [entry.name for entry in entries]
    raise InputError(f"baseline={name} is none of the rows{nearest(name, names)}")


def describe_all(entries: list[Entry], patience: float) -> None:
    """Parameters, multiply-accumulates and so on; where they cannot be said, loading will tell why."""
    by_contender: dict[str, list[Entry]] = {}
    for entry in entries:
        by_contender.setdefault(entry.contender.label, []).append(entry)
    for same in bar(by_contender.values(), desc="counting", leave=False):
        with contextlib.suppress(Lost), closing_worker(Worker(describe, (same[0].contender,), patience)) as worker:
            known = worker.answer()
            for entry in same:
                entry.known |= known


def prepare_all(entries: list[Entry], patience: float) -> None:
    """Files that backends need, once for all that make the same of a contender."""
    done: dict[tuple[str, Any], str | None] = {}
    for entry in bar(entries, desc="exporting", leave=False):
        make = BACKENDS[entry.backend].prepare
        if entry.reason or make is None or entry.contender.kind != "torch":
            continue
        key = (entry.contender.source, make)
        if key not in done:
            arguments = (entry.contender, entry.backend, entry.folder)
            with losing(entry), closing_worker(Worker(prepare, arguments, patience)) as worker:
                worker.answer()
            done[key] = entry.reason
        entry.reason = done[key]
        for made in ("encoder.onnx", "Encoder.mlpackage"):
            if (entry.folder / made).exists():
                entry.known["file_bytes"] = file_size(entry.folder / made)


def launch(
    entries: list[Entry], baseline: Entry | None, settings: StudentsBenchmark, threads: int, number: int
) -> Entry | None:
    """Start every contender anew, warm all up, and measure them in turns; in the last launch, counted from 0 to
    `settings.launches` - 1, also with several images at once. What gets lost on the way says why.

    Returns:
        The baseline: the first that runs, where there was none yet.
    """
    workers: dict[str, Worker] = {}
    try:
        for entry in bar([each for each in entries if each.reason is None], desc="starting", leave=False):
            with losing(entry):
                arguments = (entry.contender, entry.backend, entry.folder, threads, settings.turn_seconds)
                worker = workers[entry.name] = Worker(serve, arguments, settings.patience)
                worker.answer()
                note_warm_up(entry, worker.ask("warm_up"))
        running = {entry.name: entry for entry in entries if entry.reason is None}
        if not running:
            return baseline
        baseline = baseline or next(iter(running.values()))
        there = baseline.name in running
        subjects = {name: turn_of(entry, workers[name]) for name, entry in running.items()}
        beside = baseline.name if there else next(iter(running))
        before = number * settings.rounds
        for name, measured in interleave(subjects, settings.rounds, beside, warm_up=False, before=before).items():
            running[name].measured.seconds += measured.seconds
            running[name].measured.pairs += measured.pairs if there else [[]]
        batches = numbers_in(settings.batches) if number == settings.launches - 1 else []
        for name, entry in bar(running.items(), desc="decoder, batches", leave=False):
            if entry.reason is None:
                finish(entry, workers[name], settings.decoder_runs, batches)
            workers[name].close()
        return baseline
    finally:
        for worker in workers.values():
            worker.close()


def note_warm_up(entry: Entry, warm: dict[str, Any]) -> None:
    """Keep what warming up says: memory of the first launch, times of all."""
    for key in ("peak_memory_bytes", "peak_gpu_bytes"):
        if key in warm:
            entry.known.setdefault(key, warm[key])
    entry.known.setdefault("warm_up_ms", []).extend(in_ms([[warm["first"], *warm["seconds"]]]))
    entry.known["stable"] = entry.known.get("stable", True) and warm["stable"]


def turn_of(entry: Entry, worker: Worker) -> Callable[[], list[float]]:
    """A turn in the worker; nothing once it is lost."""

    def turn() -> list[float]:
        seconds: list[float] = []
        if entry.reason is None:
            with losing(entry):
                seconds = worker.ask("turn")
        return seconds

    return turn


def finish(entry: Entry, worker: Worker, decoder_runs: int, batches: list[int]) -> None:
    """The decoder; and in the last launch batches. A decoder that fails, or a batch that is too large, costs nothing
    else."""
    try:
        if decoder_runs:
            seconds = worker.ask("decode", decoder_runs)
            if isinstance(seconds, str):
                entry.known["decoder_reason"] = seconds
            else:
                entry.decoder.append(seconds)
    except Lost as lost:
        entry.known["decoder_reason"] = entry.known["batch_reason"] = f"decoder: {lost}"
        return
    for images in batches:
        try:
            seconds = worker.ask("throughput", images)
        except Lost as lost:
            entry.known["batch_reason"] = f"{images} images at once: {lost}"
            return
        if seconds is None:
            entry.known["batch_reason"] = "takes one image at once"
            return
        entry.known.setdefault("batches_ms", {})[images] = in_ms([seconds])[0]
        rate = images / statistics.median(seconds)
        if rate > entry.known.get("images_per_s", 0):
            entry.known |= {"images_per_s": round(rate, 3), "best_batch": images}


@contextlib.contextmanager
def losing(*entries: Entry) -> Iterator[None]:
    """Note in rows why they end here, and go on with the others."""
    try:
        yield
    except Lost as lost:
        for entry in entries:
            entry.reason = entry.reason or str(lost)


@contextlib.contextmanager
def closing_worker(worker: Worker) -> Iterator[Worker]:
    """End a worker's process in any case."""
    try:
        yield worker
    finally:
        worker.close()


def numbers_in(text: str) -> list[int]:
    """`1,2,4` → [1, 2, 4], the smallest first; `0` → none.

    Raises:
        InputError: it is something else.
    """
    try:
        found = sorted({int(word) for word in text.split(",")} - {0})
    except ValueError:
        found = [-1]
    if found and found[0] < 1:
        raise InputError(f"batches={text} are not numbers of images after commas")
    return found
