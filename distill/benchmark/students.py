"""What each student costs: latency, memory, size and fidelity of any encoders on any backends, beside each other."""

import contextlib
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
from distill.benchmark.timing import Measured, interleave, join, spread
from distill.benchmark.worker import Lost, Worker, describe, prepare, serve
from distill.checks import nearest
from embeddings_cache.overlap import available_cores
from embeddings_cache.progress import bar
from students import InputError

QUICK: dict[str, Any] = {"launches": 1, "rounds": 4, "decoder_runs": 0, "batches": "0", "backends": "eager"}
"""What `quick` changes of the defaults."""


@dataclass
class StudentsBenchmark:
    contenders: str = "recipes"  # after commas, or without a key: names, files, or the groups recipes, students, sam
    backends: str = "auto"  # after commas; auto: all that can run here, but for compiled; all: with the reason why not
    baseline: str | None = None  # CONTENDER or CONTENDER:BACKEND that ratios are to; default: the first row
    image_size: int = 1024  # of students that go by a name: side of the square input in pixels
    launches: int = 5  # times that each contender's process is started anew; the ratio's interval comes from them
    rounds: int = 3  # turns of each in a launch
    turn_seconds: float = 0.5  # what a turn takes at least, so that one of a fast encoder has several runs
    batches: str = "1,2,4"  # after commas: images at once that are tried for images/s; 0: none
    decoder_runs: int = 10  # of each decoder, in each launch
    threads: int | None = None  # and cores of each contender; default: all
    quick: bool = False  # or --quick, a minute's answer: eager, one launch, the encoder's latency alone
    patience: float = 600.0  # seconds after which a contender that does not answer is given up
    out: str = "benchmark.json"  # where the numbers go; .md, .png and .svg beside it


@dataclass
class Entry:
    """A row in the making: a contender on a backend, what is known of it, and why it stopped."""

    contender: Contender
    backend: str
    folder: Path
    known: dict[str, Any] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    decoder: list[float] = field(default_factory=list)
    reason: str | None = None

    @property
    def name(self) -> str:
        return f"{self.contender.label}:{self.backend}"

    def row(self) -> dict[str, Any]:
        """As `benchmark.json` has it; `reason` says why numbers are missing."""
        measured = join([{"": launch} for launch in self.measured]).get("")
        times = measured.as_json() if measured and any(measured.seconds) else {}
        decoder = {f"decoder_{key}": value for key, value in spread(self.decoder).items()} if self.decoder else {}
        return {
            "name": self.contender.label,
            "backend": self.backend,
            **self.known,
            **times,
            **decoder,
            "reason": self.reason,
        }


def benchmark_students(settings: StudentsBenchmark) -> dict[str, Any]:
    """Measure, and return what goes to `benchmark.json`.

    Raises:
        InputError: a setting that makes no sense.
    """
    if settings.quick:
        defaults = StudentsBenchmark()
        for key, value in QUICK.items():  # what was asked for stays
            if getattr(settings, key) == getattr(defaults, key):
                setattr(settings, key, value)
    batches = numbers_in(settings.batches)
    contenders = find_contenders(settings.contenders.split(","), settings.image_size)
    threads = settings.threads or available_cores()
    with TemporaryDirectory(prefix="students-benchmark-") as scratch:
        entries, not_here = plan(contenders, settings.backends.split(","), Path(scratch))
        baseline = find_baseline(entries, settings.baseline)
        describe_all(entries, settings.patience)
        prepare_all(entries, settings.patience)
        for number in range(settings.launches):
            launch(entries, baseline, settings, threads, batches if number == settings.launches - 1 else [])
    return {
        "settings": vars(settings),
        "machine": machine(torch.device("cpu"), threads),
        "baseline": baseline.name,
        "rows": [entry.row() for entry in entries],
        "not_here": not_here,
        "published": PUBLISHED_LATENCIES,
    }


def plan(contenders: list[Contender], asked: list[str], scratch: Path) -> tuple[list[Entry], dict[str, str]]:
    """Every contender on every backend that is asked for and runs its kind; and with `auto`, which backends are not
    here and why.

    Raises:
        InputError: an unknown backend; a contender that none of them runs.
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
            folder = scratch / str(sources.index(contender.source))  # one that comes twice shares its files
            folder.mkdir(exist_ok=True)
            entries.append(Entry(contender, name, folder, reason=missing.get(name)))
    return entries, missing if "auto" in asked else {}


def find_baseline(entries: list[Entry], name: str | None) -> Entry:
    """The row that ratios are to: by default the first that can run here.

    Raises:
        InputError: there is none of this name.
    """
    if name is None:
        return next((entry for entry in entries if entry.reason is None), entries[0])
    for entry in entries:
        if name in (entry.name, entry.contender.label):
            return entry
    names = [entry.name for entry in entries]
    raise InputError(f"baseline={name} is none of the rows{nearest(name, names)}")


def describe_all(entries: list[Entry], patience: float) -> None:
    """Parameters, multiply-accumulates and so on; a contender of which they cannot be said cannot be run either."""
    by_contender: dict[str, list[Entry]] = {}
    for entry in entries:
        by_contender.setdefault(entry.contender.label, []).append(entry)
    for same in bar(by_contender.values(), desc="counting", leave=False):
        with losing(*same), closing_worker(Worker(describe, (same[0].contender,), patience)) as worker:
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
        encoder = entry.folder / "encoder.onnx"
        if encoder.exists():
            entry.known["file_bytes"] = encoder.stat().st_size


def launch(
    entries: list[Entry], baseline: Entry, settings: StudentsBenchmark, threads: int, batches: list[int]
) -> None:
    """Start every contender anew, warm all up, and measure them in turns; what gets lost on the way says why."""
    workers: dict[str, Worker] = {}
    try:
        for entry in bar([each for each in entries if each.reason is None], desc="starting", leave=False):
            with losing(entry):
                arguments = (entry.contender, entry.backend, entry.folder, threads, settings.turn_seconds)
                worker = workers[entry.name] = Worker(serve, arguments, settings.patience)
                worker.answer()
                warm = worker.ask("warm_up")
                if not entry.measured:  # the first launch
                    entry.known |= {key: warm[key] for key in ("peak_memory_bytes", "peak_gpu_bytes") if key in warm}
                entry.known.setdefault("warm_up_runs", []).append(len(warm["seconds"]))
                entry.known["stable"] = entry.known.get("stable", True) and warm["stable"]
        running = {entry.name: entry for entry in entries if entry.reason is None}
        subjects = {name: turn_of(entry, workers[name]) for name, entry in running.items()}
        if not subjects:
            return
        middle = baseline.name if baseline.name in subjects else next(iter(subjects))
        for name, measured in interleave(subjects, settings.rounds, middle, warm_up=False).items():
            if baseline.name not in subjects:
                measured.pairs = [[]]  # without the baseline there are no ratios, and still times
            running[name].measured.append(measured)
        for name, entry in bar(running.items(), desc="decoder, batches", leave=False):
            if entry.reason is None:
                finish(entry, workers[name], settings.decoder_runs, batches)
    finally:
        for worker in workers.values():
            worker.close()


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
    """The decoder; and in the last launch batches, of which one that is too large costs nothing else."""
    if decoder_runs:
        with losing(entry):
            seconds = worker.ask("decode", decoder_runs)
            if isinstance(seconds, str):
                entry.known["decoder_reason"] = seconds
            else:
                entry.decoder += seconds
    best: dict[str, Any] = {}
    for images in batches if entry.reason is None else ():
        try:
            rate = worker.ask("throughput", images)
        except Lost as lost:
            entry.known["batch_reason"] = f"{images} at once: {lost}"
            break
        if rate is None:
            entry.known["batch_reason"] = "takes one image at once"
            break
        if rate > best.get("images_per_s", 0):
            best = {"images_per_s": round(rate, 3), "best_batch": images}
    entry.known |= best


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
