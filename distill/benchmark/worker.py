"""A contender in a process of its own: it waits for its turns, and takes nothing along when it dies."""

import contextlib
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
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

WARM_UP_RUNS, WARM_UP_SECONDS = 40, 20.0
"""Where warming up ends anyway."""

SHORT = 1.0
"""Seconds; a run shorter than this is first done once without counting, for the caches that others have filled."""


FAREWELL_SECONDS = 5.0


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
        if not self.connection.poll(self.patience):
            self.close(at_once=True)
            raise Lost(f"no answer for {self.patience:.0f} s")
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
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
    _answer(connection, lambda: _prepared(contender, backend, folder))


def _prepared(contender: Contender, backend: str, folder: Path) -> None:
    make = BACKENDS[backend].prepare
    assert make is not None
    make(contender, folder)


def describe(connection: Connection, contender: Contender) -> None:
    """Process: answer with the contender's `facts`."""
    _answer(connection, lambda: facts(contender))


def serve(connection: Connection, contender: Contender, backend: str, folder: Path, threads: int, turn: float) -> None:
    """Process: load a contender, say so, and answer the requests that `Bench` has methods for."""
    with contextlib.suppress(EOFError):  # the parent has gone
        if (bench := _answer(connection, lambda: _bench(contender, backend, folder, threads, turn), say=None)) is None:
            return
        connection.send("ready")
        while True:
            method, *arguments = connection.recv()
            if _answer(connection, lambda: getattr(bench, method)(*arguments)) is Failure:  # noqa: B023
                return


def _answer(connection: Connection, work: Callable[[], Any], say: str | None = "result") -> Any:
    """Do something and send what comes of it, or why nothing does."""
    _die_first()
    try:
        result = work()
    except Exception as error:
        connection.send(Failure(first_line(error) or type(error).__name__))
        return Failure if say else None
    if say:
        connection.send(result)
    return result


def _die_first() -> None:
    """Where Linux runs out of memory, let it take this process and not the one that keeps the results."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _bench(contender: Contender, backend: str, folder: Path, threads: int, turn: float) -> "Bench":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    return Bench(BACKENDS[backend].load(contender, folder, threads), turn)


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
            Seconds of each run, whether they settled, and `peak_memory_bytes` of this process from the first one on.
        """
        peak_bytes(forget=True)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        while len(seconds) < WARM_UP_RUNS and not (settled := _settled(seconds)):
            seconds.append(self._run(1))
            if sum(seconds) > WARM_UP_SECONDS and len(seconds) > 1:
                break
        self.usual = statistics.median(seconds[-3:])
        result: dict[str, Any] = {"seconds": seconds, "stable": settled, "peak_memory_bytes": peak_bytes()}
        if torch.cuda.is_initialized():
            result["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        return result

    def turn(self) -> list[float]:
        """Encode images one by one; seconds of each that counts."""
        if self.usual < SHORT:
            self._run(1)
        return [self._run(1) for _ in range(max(1, round(self.turn_seconds / self.usual)))]

    def decode(self, runs: int) -> list[float] | str:
        """Seconds of each decoder run after a first one, or why there is none."""
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

    def throughput(self, images: int) -> float | None:
        """Images a second in batches of so many; None where it takes only one at once."""
        if images > 1 and not self.runner.batches:
            return None
        self._run(images)
        seconds = [self._run(images)]
        while sum(seconds) < 2 * self.turn_seconds:
            seconds.append(self._run(images))
        return images / statistics.median(seconds)

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
    if len(seconds) < 6:
        return False
    before, now = statistics.median(seconds[-6:-3]), statistics.median(seconds[-3:])
    return abs(now - before) <= STABLE * before


def _refuse_nan(output: np.ndarray, part: str) -> None:
    if not np.isfinite(output).all():
        raise ArithmeticError(f"its {part} makes numbers that are not finite")
