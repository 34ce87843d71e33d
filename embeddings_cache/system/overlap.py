"""Work that goes on in threads or processes while something else is busy, in order and never far ahead."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from itertools import repeat
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def available_cores() -> int:
    """Cores that this process may use; a container's or a scheduler's mask counts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_here() -> int:
    """Processes of this launch on this machine, as launchers say it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Generator[R, None, None]:
    """`map(function, items)` by some threads, with at most `ahead` results waiting or under way.

    What `items` raises comes after the results of all items before it. When the caller stops early, what has not been
    begun is dropped.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        yield from submit_ahead(pool, function, items, ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def submit_ahead(
    pool: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int
) -> Generator[R, None, None]:
    """`map_ahead` by a pool that others may use as well."""
    iterator, failure = iter(items), None
    pending: deque[Future[R]] = deque()
    try:
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        if failure is not None:
            raise failure
    finally:
        for future in pending:
            future.cancel()


def iterate_ahead(items: Iterable[T], ahead: int) -> Generator[T, None, None]:
    """`items`, taken from their iterator by a thread, at most `ahead` before they are asked for."""
    iterator, end = iter(items), object()
    with closing(map_ahead(lambda _: next(iterator, end), repeat(None), threads=1, ahead=ahead)) as asked:
        for item in asked:
            if item is end:
                return
            yield item  # type: ignore[misc]
