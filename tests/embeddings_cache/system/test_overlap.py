import threading
import time
from collections.abc import Callable, Iterator

import pytest

from embeddings_cache.system.overlap import iterate_ahead, map_ahead


def slow_square(value: int) -> int:
    time.sleep(0.01 * (value % 3))
    return value * value


@pytest.mark.parametrize("threads", [1, 4])
def test_order_is_kept(threads: int) -> None:
    assert list(map_ahead(slow_square, range(20), threads, ahead=6)) == [n * n for n in range(20)]


def test_it_never_runs_far_ahead() -> None:
    taken = []

    def numbers() -> Iterator[int]:
        for n in range(100):
            taken.append(n)
            yield n

    for n in map_ahead(slow_square, numbers(), 2, ahead=3):
        assert len(taken) <= n**0.5 + 4


def test_work_goes_on_while_the_caller_is_busy() -> None:
    """Each side waits for the other to have begun: one after the other, this would never end."""
    begun = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for n in range(4):
            begun[n].set()
            yield n

    for n in iterate_ahead(items(), ahead=2):
        if n < 3:
            assert begun[n + 1].wait(60)


def failing() -> Iterator[int]:
    yield from (1, 2, 3)
    raise ValueError("broken")


@pytest.mark.parametrize("run", [lambda: map_ahead(slow_square, failing(), 2, 4), lambda: iterate_ahead(failing(), 4)])
def test_an_error_comes_after_what_was_before_it(run: Callable[[], Iterator[int]]) -> None:
    results = run()
    assert [next(results) for _ in range(3)] in ([1, 4, 9], [1, 2, 3])
    with pytest.raises(ValueError, match="broken"):
        next(results)


def test_stopping_early_ends_the_threads() -> None:
    before = threading.active_count()
    for value in iterate_ahead(iter(range(10**9)), ahead=3):
        if value == 5:
            break
    time.sleep(0.1)
    assert threading.active_count() == before
