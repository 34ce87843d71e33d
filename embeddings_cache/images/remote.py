"""Sources that are not files of this machine: object stores, hubs and web servers by fsspec, and commands.

A download that breaks off is taken up where it was; after some tries it stops the run, which can go on later.
"""

import io
import re
import time
from importlib.util import find_spec
from typing import IO, Any

import webdataset as wds
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from students import InputError, first_line

TRIES = 6
"""How often what cannot be read is tried; with twice the pause each time, half a minute in all."""
FIRST_PAUSE = 1.0
"""Seconds."""
BUFFER = 1 << 20
FINAL = (401, 403, 404, 410)
"""What a web server says that it will say again. fsspec calls everything that it cannot look at a file not found."""


def is_remote(source: str) -> bool:
    """Whether a source is a URL, or a `pipe:` command."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", source) is not None


def expand_remote(url: str) -> list[str]:
    """The files that a URL names: itself, or what it matches where it is a glob (`s3://bucket/sa_*.tar`).

    Raises:
        InputError: nothing matches, or what reads such URLs is not installed.
    """
    if _by_command(url):
        return [url]
    files, path = _file_system(url)
    web = url.startswith(("http:", "https:"))  # where a question mark begins a query
    if not re.search(r"\*" if web else r"[*?\[]", path):
        return [url]
    try:
        found = sorted(files.unstrip_protocol(name) for name in files.glob(path))
    except Exception as error:  # each store has errors of its own
        raise InputError(f"no images: {url} cannot be listed: {first_line(error)}") from error
    if not found:
        raise InputError(f"no images: nothing matches {url!r}")
    return found


def open_remote(url: str) -> IO[bytes]:
    """A source's bytes, from front to back.

    Raises:
        InputError: what reads such URLs is not installed.
        OSError: it cannot be opened; reading raises it where a download breaks off for good.
    """
    if _by_command(url):
        return wds.gopen(url)
    return io.BufferedReader(_Download(url), BUFFER)


class _Download(io.RawIOBase):
    """A remote file's bytes; where reading fails it is opened again at the same place, some times."""

    def __init__(self, url: str) -> None:
        self._files, self._path = _file_system(url)
        self._file: Any = None
        self._place = 0
        self._size = self._patiently(self._size_now)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._patiently(lambda: self._read(len(buffer)))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def close(self) -> None:
        self._let_go()
        super().close()

    def _size_now(self) -> int | None:
        return self._files.size(self._path)

    def _read(self, most: int) -> bytes:
        if self._file is None:
            self._file = _open_at(self._files, self._path, self._place, self._size)
        content = self._file.read(most)
        if not content and self._size is not None and self._place < self._size:
            raise EOFError(f"it broke off after {self._place:,} of {self._size:,} bytes")
        return content

    def _patiently(self, action: Any) -> Any:
        for tried in range(1, TRIES + 1):
            try:
                return action()
            except PermissionError:
                raise
            except Exception as error:  # each store has errors of its own
                self._let_go()
                cause: Any = error.__cause__ if isinstance(error, FileNotFoundError) else error
                if cause is None or getattr(cause, "status", None) in FINAL:
                    raise FileNotFoundError("no such file, or none that one may read") from error
                if tried == TRIES:
                    raise OSError(f"{first_line(cause)} (tried {TRIES} times)") from error
            time.sleep(FIRST_PAUSE * 2 ** (tried - 1))

    def _let_go(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _open_at(files: AbstractFileSystem, path: str, place: int, size: int | None) -> Any:
    """An open file at a place; its size, where it is known, is not asked for again.

    From a web server one response is read, and not a request a block: not all can seek.
    """
    if "http" not in files.protocol:
        file = files.open(path, "rb")
        file.seek(place)
        return file
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={place}-"} if place else {})
    file = files.open(path, "rb", block_size=0, headers=headers, size=size)
    if place and file.r.status != 206:  # it sends all of it again
        while place and (passed := file.read(min(place, BUFFER))):
            place -= len(passed)
    return file


def _by_command(url: str) -> bool:
    """Whether WebDataset reads it: the output of a command; and the web through curl where nothing else can."""
    return url.startswith("pipe:") or (url.startswith(("http:", "https:")) and find_spec("aiohttp") is None)


def _file_system(url: str) -> tuple[AbstractFileSystem, str]:
    options: dict[str, Any] = {}
    if url.startswith(("http:", "https:")):
        from aiohttp import ClientTimeout

        options = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
    try:
        files, path = url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: {first_line(error)} (pip install -e '.[remote]')") from error
    return files, path
