"""Ending in order when the system asks for it: preemption sends SIGTERM, Ctrl-C SIGINT."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from students import InputError


class Stopped(Exception):
    """The run was asked to end, and has kept what it had; `signal_number` says by what."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class StopRequest:
    """Whether one has come, and by which signal."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def raise_if_made(self) -> None:
        """Raise `Stopped` if it has."""
        if self.signal_number is not None:
            raise Stopped(self.signal_number)


@contextmanager
def stop_on_request() -> Iterator[StopRequest]:
    """Within this, SIGTERM and the first SIGINT only leave a request; a second SIGINT interrupts as ever.

    A system that preempts sends SIGTERM more than once: to a job's processes, and through their launcher. What fails
    because of it, a download for instance, counts as stopped.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    before = {int(number): signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield request
    except InputError:
        request.raise_if_made()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
