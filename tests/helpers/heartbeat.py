"""A line now and then while a test takes minutes: some who run tests end what has been silent for long."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

EVERY = 60.0
"""Seconds."""


@contextmanager
def heartbeat(name: str, terminal: int = 1, every: float = EVERY) -> Iterator[None]:
    """Within this, say every so many seconds that `name` still runs.

    Args:
        name: of the test.
        terminal: where to, a file descriptor; pytest puts another file in its place while a test runs, so that it is
            looked up now.
        every: seconds between lines.
    """
    began, ended, out = time.monotonic(), Event(), os.dup(terminal)

    def beat() -> None:
        while not ended.wait(every):
            os.write(out, f"\n[{time.monotonic() - began:.0f} s in {name}]\n".encode())

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        os.close(out)
