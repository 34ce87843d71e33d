"""A contender in a process of its own: it waits for its turns, and takes nothing along when it dies."""

import contextlib
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.benchmark.backends import BACKENDS, Runner
from distill.benchmark.contenders import Contender, facts
from distill.benchmark.machine import peak_bytes
from students import first_line

STABLE = 0.05
"""Warm when the medians of three runs and of the three before differ by no more than this share."""

WARM_UP_RUNS, WARM_UP_SECONDS = 40, 60.0
"""Where warming up ends anyway."""

SLOW = 10.0
"""Seconds of warming up after which single runs are compared instead of medians of three."""

PAUSE = 0.1
"""Seconds before a turn, in which the threads of whoever had the last one stop waiting for more work."""

SHORT = 1.0
"""Seconds; a run shorter than this is first done once without counting, for the caches that others have filled."""


FAREWELL_SECONDS = 5.0
"""That a process has to end by itself."""


class Lost(Exception):
    """A contender that cannot go on; the message is the reason, one line."""


@dataclass(frozen=True)
class Failure:
    """What a worker says when it gives up."""

    reason: str


class Worker:
    """The parent's end of a contender's process.

    Args:
        work: called there with the connection and `arguments`; both must be picklable.
        patience: seconds until an answer is given up.
    """

    def __init__(self, work: Callable[..., None], arguments: tuple[Any, ...], patience: float) -> None:
        context = _context()
        self.patience = patience
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *arguments), daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        """Send a request and wait for its answer.

        Raises:
            Lost: there is none; the process is gone then.
        """
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # what it said before it went can be read
            self.connection.send(request)
        return self.answer()

    def answer(self) -> Any:
        """Wait for what the process says next; raises as `ask`."""
        try:
            if not self.connection.poll(self.patience):
                self.close(at_once=True)
                raise Lost(f"no answer for {self.patience:.0f} s")
            answer = self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(FAREWELL_SECONDS)
            self.process.kill()
            self.process.join()
            raise Lost(_how_it_died(self.process.exitcode)) from None
        if isinstance(answer, Failure):
            self.close()
            raise Lost(answer.reason)
        return answer

    def close(self, at_once: bool = False) -> None:
        """End the process: it is given the time to notice that nobody asks any more, or `at_once` none."""
        self.connection.close()
        if not at_once:
            self.process.join(FAREWELL_SECONDS)
        self.process.kill()
        self.process.join()


def _context() -> BaseContext:
    """Processes that start clean. On Linux they are forked off one that has only imported, which saves seconds each."""
    if not sys.platform.startswith("linux"):
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _how_it_died(exitcode: int | None) -> str:
    if exitcode == -getattr(signal, "SIGKILL", 9):
        return "killed, most likely for want of memory"
    return f"died of {signal.Signals(-exitcode).name}" if exitcode and exitcode < 0 else f"ended with code {exitcode}"


def prepare(connection: Connection, contender: Contender, backend: str, folder: Path) -> None:
    """Process: make a backend's files."""
    make = BACKENDS[backend].prepare
    assert make is not None
    with _telling(connection):
        make(contender, folder)
        connection.send("made")


def describe(connection: Connection, contender: Contender) -> None:
    """Process: answer with the contender's `facts`."""
    with _telling(connection):
        connection.send(facts(contender))


def serve(
    connection: Connection, contender: Contender, backend: str, folder: Path, threads: int, turn_seconds: float
) -> None:
    """Process: load a contender, say so, and answer the requests that `Bench` has methods for."""
    with _telling(connection):
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        torch.set_num_threads(threads)
        bench = Bench(BACKENDS[backend].load(contender, folder, threads), turn_seconds)
        connection.send("ready")
        while True:
            method, *arguments = connection.recv()
            connection.send(getattr(bench, method)(*arguments))


@contextlib.contextmanager
def _telling(connection: Connection) -> Iterator[None]:
    """Say what went wrong, unless nobody listens any more; Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_first()
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            yield
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            connection.send(Failure(first_line(error)))


def _die_first() -> None:
    """Where Linux runs out of memory, let it take this process and not the one that keeps the results."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


class Bench:
    """What a contender is asked to do. Every image is another one, drawn before the clock runs, and every output is
    looked at after it has stopped.

    Raises, all methods: `ArithmeticError` where an output has a number that is not finite.

    Args:
        runner: the contender.
        turn_seconds: what a turn, and a measurement of images/s, takes at least.
    """

    def __init__(self, runner: Runner, turn_seconds: float) -> None:
        self.runner, self.turn_seconds = runner, turn_seconds
        self.random = np.random.default_rng(os.getpid())
        self.usual = math.inf
        """Seconds that a run takes, from warming up."""

    def warm_up(self) -> dict[str, Any]:
        """Run until the time settles.

        Returns:
            `first`, the seconds of the first run, in which some compile; `seconds` of each run after it, whether they
            settled, and `peak_memory_bytes` of this process in these.
        """
        first = self._run(1)
        peak_bytes(forget=True)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        while not _settled(seconds) and len(seconds) < WARM_UP_RUNS and sum(seconds) < WARM_UP_SECONDS:
            seconds.append(self._run(1))
        self.usual = statistics.median(seconds[-3:])
        result: dict[str, Any] = {"first": first, "seconds": seconds, "stable": _settled(seconds)}
        result["peak_memory_bytes"] = peak_bytes()
        if torch.cuda.is_initialized():
            result["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        return result

    def turn(self) -> list[float]:
        """Encode images one by one; seconds of each that counts."""
        time.sleep(PAUSE)
        if self.usual < SHORT:
            self._run(1)
        return [self._run(1) for _ in range(max(1, round(self.turn_seconds / self.usual)))]

    def decode(self, runs: int) -> list[float] | str:
        """Seconds of each decoder run after a first one, or why there are none."""
        try:
            return self._decode(runs)
        except Exception as error:  # which the encoder has nothing to do with
            return first_line(error)

    def _decode(self, runs: int) -> list[float] | str:
        if isinstance(self.runner.decode, str):
            return self.runner.decode
        shape = self.runner.encode(self.runner.feed(self._pixels(1))).shape
        seconds = []
        for _ in range(runs + 1):
            embedding = self.random.standard_normal(shape, dtype=np.float32)
            started = time.perf_counter()
            masks = self.runner.decode(embedding)
            seconds.append(time.perf_counter() - started)
            _refuse_nan(masks, "decoder")
        return seconds[1:]

    def throughput(self, images: int) -> list[float] | None:
        """Seconds of each batch of so many, after a first one; None where it takes only one image at once."""
        if images > 1 and not self.runner.batches:
            return None
        self._run(images)
        seconds = [self._run(images)]
        while sum(seconds) < self.turn_seconds:
            seconds.append(self._run(images))
        return seconds

    def _pixels(self, images: int) -> np.ndarray:
        size = self.runner.image_size
        return self.random.integers(0, 256, (images, 3, size, size), dtype=np.uint8)

    def _run(self, images: int) -> float:
        fed = self.runner.feed(self._pixels(images))
        started = time.perf_counter()
        embedding = self.runner.encode(fed)
        seconds = time.perf_counter() - started
        _refuse_nan(embedding, "encoder")
        return seconds


def _settled(seconds: Sequence[float]) -> bool:
    width = 3 if sum(seconds) < SLOW else 1
    if len(seconds) < 2 * width:
        return False
    before, now = statistics.median(seconds[-2 * width : -width]), statistics.median(seconds[-width:])
    return abs(now - before) <= STABLE * before


def _refuse_nan(output: np.ndarray, part: str) -> None:
    if not np.isfinite(output).all():
        raise ArithmeticError(f"its {part} makes numbers that are not finite")
