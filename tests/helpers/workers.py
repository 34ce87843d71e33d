"""What processes do in tests; in a module that a process can import by its name."""

import os
import time
from multiprocessing.connection import Connection


def sleep_on(connection: Connection) -> None:
    time.sleep(600)


def crash(connection: Connection) -> None:
    os.abort()


def double(value: int) -> int:
    return 2 * value
