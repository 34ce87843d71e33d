"""Archives of pictures and annotations: tars and zips; local ones are read file by file, others from front to back."""

import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from embeddings_cache.images.names import ANNOTATION, is_hidden, is_picture, stem_of, suffix_of, webdataset_key
from embeddings_cache.images.remote import is_remote, open_remote
from embeddings_cache.system import PASSING
from students import InputError, first_line

TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged tar raises, compressed or not."""
ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged, encrypted or unusually packed zip raises."""

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
LARGEST_FILE = 2**31
"""Bytes of a file that is read; more is no photograph, whatever an archive says that it unpacks to."""
FILES_TOGETHER = 64
"""Files of one WebDataset key that are kept while an archive is read as it comes; more are no single sample's."""

Member = tuple[str, Callable[[], bytes]]
"""A file's name in the archive, without `./`, and reading it."""


def is_archive(path: str) -> bool:
    """Whether a path is called like an archive."""
    return path.lower().endswith(SUFFIXES)


def is_stream(source: str) -> bool:
    """Whether an archive can only be read from front to back: it is remote, or a tar that is compressed as a whole."""
    return is_remote(source) or not (_is_plain_tar(source) or zipfile.is_zipfile(source))


@contextmanager
def open_members(path: str, damaged: Callable[[str], None]) -> Iterator[list[Member]]:
    """All files of a local archive that is not compressed as a whole, to be read in any order.

    Args:
        path: a tar or a zip.
        damaged: is told what is wrong with a tar that is cut short; what is whole is listed.

    Raises:
        InputError: it cannot be opened at all.
    """
    opened = _open_plain_tar(path, damaged) if _is_plain_tar(path) else _open_zip(path)
    with opened as members:
        yield members


def read_stream(source: str, damaged: Callable[[str], None]) -> Iterator[list[Member]]:
    """An archive that is read from front to back: files that may belong together, as they follow each other.

    A local tar that ends early gives what it has; a download that breaks off stops the run, which can go on later.

    Raises:
        InputError: it cannot be opened, or a download broke off.
    """
    together: list[Member] = []
    last: str | None = None
    for member in _stream_files(source, damaged):
        name = member[0]
        if not is_hidden(name):  # macOS puts `._1.json` between `1.jpg` and `1.json`
            enough = stem_of if len(together) >= FILES_TOGETHER else webdataset_key
            if last is not None and enough(name) != enough(last):
                yield together
                together = []
            last = name
        together.append(member)
    if together:
        yield together


def first_names(path: str, most: int) -> tuple[list[str], float]:
    """The names of a local archive's first files, and the share of its bytes that they take.

    Of a damaged one what can be listed: reading it will say what is wrong, and stop or go on.
    """
    names: list[str] = []
    if not is_stream(path) and not _is_plain_tar(path):
        with suppress(*ZIP_ERRORS), zipfile.ZipFile(path) as archive:
            names = [_without_dot(member.filename) for member in archive.infolist() if not member.is_dir()]
        return names, 1.0
    with suppress(*TAR_ERRORS), tarfile.open(path) as tar:
        for number, member in enumerate(tar):
            if number == most:
                return names, min(1.0, member.offset / os.path.getsize(path))
            if member.isreg():
                names.append(_without_dot(member.name))
    return names, 1.0


def _is_plain_tar(path: str) -> bool:
    """To be asked first: a tar that ends with a zip looks like a zip."""
    try:
        with tarfile.open(path, "r:"):
            return True
    except TAR_ERRORS:
        return False


@contextmanager
def _open_zip(path: str) -> Iterator[list[Member]]:
    try:
        archive = zipfile.ZipFile(path)
    except ZIP_ERRORS as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error

    with archive:
        files = [member for member in archive.infolist() if not member.is_dir()]
        yield [(_without_dot(member.filename), partial(_unpacked, archive, member)) for member in files]


@contextmanager
def _open_plain_tar(path: str, damaged: Callable[[str], None]) -> Iterator[list[Member]]:
    members: list[tarfile.TarInfo] = []
    with tarfile.open(path, "r:", tarinfo=_StrictMember) as tar:
        size = os.path.getsize(path)
        try:
            for member in tar:
                members.append(member)
            _refuse_more(tar.fileobj)
        except TAR_ERRORS as error:
            _refuse_trouble(path, error)
            damaged(f"tar is cut short or damaged: {first_line(error)}")
            members = [member for member in members if member.offset_data + member.size <= size]

        files = [member for member in members if member.isreg()]
        yield [(_without_dot(member.name), partial(_content, tar, member)) for member in files]


def _stream_files(source: str, damaged: Callable[[str], None]) -> Iterator[Member]:
    """Files from front to back; pictures and annotations are read as they pass.

    Unlike WebDataset's own reader this one notices a tar that ends early or goes on after its end, and a download
    that broke off.
    """
    opened = False
    try:
        with (
            _open_stream(source) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictMember) as tar,
        ):
            for member in tar:
                opened = True
                tar.members = []  # type: ignore[attr-defined] # tarfile would keep them all
                if not member.isreg():
                    continue
                name, content = _without_dot(member.name), b""
                wanted = is_picture(name) or (suffix_of(name) == ANNOTATION and not is_hidden(name))
                if wanted and member.size <= LARGEST_FILE:
                    content = _content(tar, member)
                yield name, partial(_as_read, member.size, content)
            opened = True
            _refuse_more(tar.fileobj)
    except TAR_ERRORS as error:
        _refuse_trouble(source, error)
        if not opened or is_remote(source):
            hint = (
                ""
                if source.endswith(".tar") or source.startswith("pipe:")
                else "; this takes tars, and zips that lie here"
            )
            raise InputError(f"cannot read {source}: {first_line(error)}{hint}") from error
        damaged(f"tar is cut short or damaged: {first_line(error)}")


def _open_stream(source: str) -> AbstractContextManager[IO[bytes]]:
    return open_remote(source) if is_remote(source) else Path(source).open("rb")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    _refuse_huge(member.size)
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _as_read(size: int, content: bytes) -> bytes:
    _refuse_huge(size)
    return content


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    _refuse_huge(member.file_size)
    try:
        return archive.read(member)
    except ZIP_ERRORS as error:
        raise OSError(f"damaged in the zip: {first_line(error)}") from error


def _refuse_trouble(source: str, error: Exception) -> None:
    """Raise `InputError` where what keeps an archive from being read will pass: it must not cost images."""
    if isinstance(error, OSError) and error.errno in PASSING:
        raise InputError(f"cannot read {source}: {error.strerror}; the same command goes on from here") from error


def _refuse_more(stream: Any) -> None:
    """Raise `ReadError` where anything but padding follows a tar's end mark, at which a stream stands."""
    while rest := stream.read(1 << 20):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("there is data after its end mark")


def _refuse_huge(size: int) -> None:
    if size > LARGEST_FILE:
        raise OSError(f"{size:,} bytes are more than a photograph has")


class _StrictMember(tarfile.TarInfo):
    """Lets `tarfile` end at the end mark alone; by default it also ends quietly where a header is cut or damaged."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictMember":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} where a member or the end mark should be") from error


def _without_dot(name: str) -> str:
    return re.sub(r"^(\./)+", "", name)
