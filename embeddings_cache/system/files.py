"""Files that are whole or absent, and directories that one run owns at a time."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from students import InputError

PASSING = frozenset(
    {errno.EAGAIN, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOLCK, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT}
)
"""What the system says that has nothing to do with the file that is read, and may be otherwise the next time."""

UNSUPPORTED = frozenset(
    {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ENOLCK, errno.ENOTTY}
)
"""What file systems say (SMB, FUSE, some NFS) that cannot lock a file, or flush a directory."""

REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR})
"""What some say of directories alone."""

TEMPORARY = ".tmp-"
"""Prefix of what is not finished yet; whatever a crash leaves behind carries it."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, on failure remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Flush a finished file or directory to disk and give it its final name."""
    for member in (temporary, *temporary.rglob("*")):
        _fsync(member)
    os.replace(temporary, path)
    _fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    with whole_file(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))  # names of files need not be UTF-8


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        InputError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def sole_user(directory: Path, rank: int = 0) -> Iterator[None]:
    """Hold a directory for this process; the operating system lets go of it however the process ends.

    Of several processes each holds its own lock: one that outlives the others still keeps a new run away.

    Raises:
        InputError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / (f".lock-{rank}" if rank else ".lock")
    with ExitStack() as held:
        try:
            held.enter_context(_lock(path))
        except Timeout:
            raise InputError(f"{directory} is in use by another run") from None
        yield


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """The system's lock on a file; where the file system has none, a file that says which process made it.

    What a killed process leaves of the latter is taken over on the same machine.

    Raises:
        Timeout: another process holds it.
    """
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(path, timeout=0))
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            held.enter_context(SoftFileLock(path.with_name(f"{path.name}.pid"), timeout=0))
        yield


def _fsync(path: Path) -> None:
    """Flush to disk; a file system that cannot be asked to, for directories above all, does it in its own time."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (UNSUPPORTED | REFUSED if path.is_dir() else UNSUPPORTED):
            raise
    finally:
        os.close(descriptor)
