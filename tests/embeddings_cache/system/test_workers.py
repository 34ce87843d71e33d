import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from embeddings_cache.system.workers import START, Workers
from students import InputError
from support import ROOT
from workers import double


def slow_square(value: int) -> int:
    time.sleep(0.01 * (value % 3))
    return value * value


def whoami(value: int) -> int:
    time.sleep(0.01)
    return os.getpid()


def fail_at_three(value: int) -> int:
    if value == 3:
        raise ValueError("broken")
    return value


def much(value: int) -> np.ndarray:
    return np.full(400_000, os.getpid())


def much_or_death(value: int) -> np.ndarray:
    if value == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return much(value)


@pytest.mark.parametrize(("processes", "threads"), [(0, 1), (0, 3), (1, 1), (3, 1)])
def test_order_is_kept(processes: int, threads: int) -> None:
    with Workers(slow_square, processes, threads) as workers:
        assert list(workers.map(range(20))) == [n * n for n in range(20)]
        assert list(workers.map(range(3))) == [0, 1, 4]


def test_the_work_is_done_where_it_should_be() -> None:
    with Workers(whoami, 2) as workers:
        pids = set(workers.map(range(20)))
    assert len(pids) == 2
    assert os.getpid() not in pids
    with Workers(whoami) as workers:
        assert set(workers.map(range(4))) == {os.getpid()}


def test_a_function_need_not_be_one_that_can_be_pickled() -> None:
    if START != "fork":
        pytest.skip("processes are not forked here")
    lock = threading.Lock()
    with Workers(lambda value: (value, lock.locked()), 1) as workers:
        assert list(workers.map([7])) == [(7, False)]


@pytest.mark.parametrize("processes", [0, 2])
def test_an_error_comes_after_what_was_before_it(processes: int) -> None:
    with Workers(fail_at_three, processes) as workers:
        results = workers.map(range(9))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="broken"):
            next(results)


def test_it_never_runs_far_ahead() -> None:
    taken: list[int] = []

    def items() -> object:
        for n in range(100):
            taken.append(n)
            yield n

    with Workers(slow_square, 2) as workers:
        for place, _ in enumerate(workers.map(items())):
            assert len(taken) <= place + 4


def test_stopping_early_ends_the_processes() -> None:
    with Workers(slow_square, 2) as workers:
        next(workers.map(range(10**9)))
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("busy", [True, False])
def test_a_killed_process_is_one_line(processes: int, busy: bool) -> None:
    """Also while others have more to say than a pipe holds."""
    with Workers(much_or_death if busy else much, processes) as workers:
        results = workers.map(range(20))
        first = next(results)
        if not busy:
            os.kill(int(first[0]), signal.SIGKILL)
        with pytest.raises(InputError, match="a worker process was killed, for want of memory perhaps"):
            list(results)
    assert multiprocessing.active_children() == []


def test_a_process_that_cannot_be_started_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    if START != "fork":
        pytest.skip("processes are not forked here")
    started: list[int] = []
    original = os.fork

    def refuse() -> int:
        started.append(1)
        if len(started) == 3:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return original()

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(InputError, match="only 2 of 4 worker processes could be started: Resource temporarily"):
        Workers(slow_square, 4)
    assert multiprocessing.active_children() == []


def test_where_processes_are_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embeddings_cache.system.workers.START", "spawn")
    with Workers(double, 2) as workers:
        assert list(workers.map(range(9))) == [2 * n for n in range(9)]


HELD = """
import os
import time
from embeddings_cache.system import Workers

def pid(value):
    time.sleep(0.05)
    return os.getpid()

with Workers(pid, 2) as workers:
    print(*set(workers.map(range(20))), flush=True)
    time.sleep(600)
"""


def test_they_leave_signals_to_their_parent_and_end_with_it() -> None:
    with subprocess.Popen([sys.executable, "-c", HELD], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        time.sleep(0.3)
        assert all(is_running(pid) for pid in pids)
        parent.kill()
        parent.wait()
        until = time.monotonic() + 60
        while any(is_running(pid) for pid in pids):
            assert time.monotonic() < until
            time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
