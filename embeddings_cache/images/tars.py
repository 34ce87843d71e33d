"""Tars of WebDataset samples, as SA-1B is published: names with and without `./`, from a file, a URL or a command."""

import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import webdataset as wds
from webdataset.tariterators import group_by_keys

from embeddings_cache.images.skipped import Skipped
from embeddings_cache.images.sources import IMAGE_SUFFIXES, is_hidden, is_remote
from students import InputError, first_line

TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged tar raises, compressed or not."""


def tar_samples(url: str, mine: Callable[[str], bool], skipped: Skipped) -> Iterator[dict[str, Any]]:
    """Samples as WebDataset groups them: `__key__`, and the bytes of each file by suffix.

    Raises:
        InputError: the tar cannot be opened, or a download broke off.
    """

    def handler(error: Exception) -> bool:
        skipped(url, str(error.args[0]) if error.args else repr(error))
        return True

    yield from group_by_keys(_tar_files(url, mine, skipped), handler=handler)


def first_image_keys(path: str, most: int) -> tuple[set[str], float]:
    """Keys of the images among a local tar's first members, from names alone, and the share of the tar that they take.

    Of a damaged tar what can be listed: reading the images will say what is wrong with it, and stop or go on.
    """
    keys: set[str] = set()
    with suppress(*TAR_ERRORS), tarfile.open(path) as tar:
        for number, member in enumerate(tar):
            if number == most:
                return keys, min(1.0, member.offset / os.path.getsize(path))
            name = _without_dot(member.name)
            if not is_hidden(name) and os.path.basename(name).lower().partition(".")[2] in IMAGE_SUFFIXES:
                keys.add(_member_key(name))
    return keys, 1.0


def _tar_files(url: str, mine: Callable[[str], bool], skipped: Skipped) -> Iterator[dict[str, Any]]:
    """Files of a tar in WebDataset's form.

    Unlike WebDataset's own reader this one notices a tar that ends early or goes on after its end, and a download
    that broke off: a local tar gives what it has and is reported, a remote one stops the run, which can go on later.
    """
    opened = False
    try:
        with _open_tar(url) as tar:
            for member in tar:
                opened = True
                tar.members = []  # type: ignore[attr-defined] # tarfile would keep them all
                name = _without_dot(member.name)
                if member.isreg() and not is_hidden(name) and mine(_member_key(name)):
                    content = tar.extractfile(member)
                    assert content is not None
                    yield {"fname": name, "data": content.read(), "__url__": url}
            opened = True
            while rest := tar.fileobj.read(1 << 20):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("there is data after its end mark")
    except TAR_ERRORS as error:
        if not opened or is_remote(url):
            raise InputError(f"cannot read {url}: {first_line(error)}") from error
        skipped(url, f"tar is cut short or damaged: {first_line(error)}")


@contextmanager
def _open_tar(url: str) -> Iterator[tarfile.TarFile]:
    """A tar to read from front to back; in a local one, unwanted files are passed over without reading them."""
    if is_remote(url):
        with wds.gopen(url) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictMember) as tar:
            yield tar
    else:
        with tarfile.open(url, "r:*", tarinfo=_StrictMember) as tar:
            yield tar


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


def _member_key(name: str) -> str:
    """WebDataset's key of a member: its path up to the first dot of the file's name."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.')[0]}" if folder else base.split(".")[0]
