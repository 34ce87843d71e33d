"""Processes that work on items, where threads would wait for each other: Python runs one of them at a time."""

import multiprocessing
import os
import pickle
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from embeddings_cache.system.overlap import submit_ahead
from students import InputError

T = TypeVar("T")
R = TypeVar("R")

START = "fork" if sys.platform == "linux" else "spawn"
"""A forked process is there at once and has what this one has read; on a Mac libraries do not survive it."""


class Workers(Generic[T, R]):
    """A function at work in processes of its own or, without any, in threads of this one.

    The processes start here. They leave signals to this process, which ends them, and end with it if it is killed. Each
    has a channel of its own and a thread that waits for it, so that one that is killed cannot hold up the others.

    Args:
        function: what they do; where processes are not forked it is pickled, once for each. It uses no thread pool
            that this process has used, such as PyTorch's: a fork has none of its threads.
        processes: how many; 0: none.
        threads: how many without processes.

    Raises:
        InputError: the system starts no more processes.
    """

    def __init__(self, function: Callable[[T], R], processes: int = 0, threads: int = 1) -> None:
        self._count = processes or threads
        self._function = function
        self._started: list[_Process] = []
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        try:
            for _ in range(processes):
                self._started.append(_Process(function))
                self._idle.put(self._started[-1])
        except OSError as error:
            self._end()
            raise InputError(
                f"only {len(self._started)} of {processes} worker processes could be started: {error.strerror}"
            ) from error
        if processes:
            self._function = self._hand_over
        self._pool = ThreadPoolExecutor(self._count)

    def __enter__(self) -> "Workers[T, R]":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._end()

    def map(self, items: Iterable[T]) -> Generator[R, None, None]:
        """Results in the order of their items, at most two for each worker waiting or under way.

        Raises:
            InputError: one of the processes was killed.
        """
        yield from submit_ahead(self._pool, self._function, items, 2 * self._count)

    def _hand_over(self, item: T) -> R:
        process = self._idle.get()
        try:
            return process(item)
        finally:
            self._idle.put(process)

    def _end(self) -> None:
        for process in self._started:
            process.end()


class _Process:
    """One process, and this one's end of what joins them."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context(START)
        self._ours, theirs = socket.socketpair()
        self._process = context.Process(target=_serve, args=(function, theirs), daemon=True)  # type: ignore[attr-defined]
        try:
            self._process.start()
        finally:
            theirs.close()  # the process has the only one then, and the channel ends with it

    def __call__(self, item: Any) -> Any:
        try:
            _send(self._ours, item)
            failed, result = _receive(self._ours)
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise InputError(
                "a worker process was killed, for want of memory perhaps; the same command goes on from here"
            ) from error
        if failed:
            raise result
        return result

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._ours.close()


def _send(channel: socket.socket, value: Any) -> None:
    """Arrays as they are, the rest pickled.

    `multiprocessing.Pipe` would copy arrays twice more, and ask for as much memory as is still to come for each piece.
    """
    buffers: list[pickle.PickleBuffer] = []
    parts = [memoryview(pickle.dumps(value, 5, buffer_callback=buffers.append)), *(part.raw() for part in buffers)]
    channel.sendall(struct.pack(f"<{1 + len(parts)}Q", len(parts), *(part.nbytes for part in parts)))
    for part in parts:
        channel.sendall(part)


def _receive(channel: socket.socket) -> Any:
    """Raises `EOFError` where the other end is gone."""
    (count,) = struct.unpack("<Q", _receive_bytes(channel, 8))
    sizes = struct.unpack(f"<{count}Q", _receive_bytes(channel, 8 * count))
    pickled, *buffers = [_receive_bytes(channel, size) for size in sizes]
    return pickle.loads(pickled, buffers=buffers)


def _receive_bytes(channel: socket.socket, size: int) -> bytearray:
    content = bytearray(size)
    rest = memoryview(content)
    while rest:
        received = channel.recv_into(rest)
        if not received:
            raise EOFError
        rest = rest[received:]
    return content


def _serve(function: Callable[[Any], Any], channel: socket.socket) -> None:
    """What a worker process does until it is killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        item = _receive(channel)
        try:
            answer = (False, function(item))
        except Exception as error:
            answer = (True, ExceptionWithTraceback(error, error.__traceback__))
        _send(channel, answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
