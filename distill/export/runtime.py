"""ONNX Runtime for browsers, from npm at one version, into a cache of the user's; or from a tarball that is given."""

import base64
import hashlib
import io
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from embeddings_cache.system import TEMPORARY, publish
from students import InputError, first_line

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
TARBALL = f"{PACKAGE}-{VERSION}.tgz"

INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Of the tarball, as npm's registry and lock files say it."""

FILES = (
    "ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.bundle.min.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
"""Out of the tarball's `package/dist/`: the processor's runtime, and the graphics card's. A page loads one of them."""

REGISTRY = "https://registry.npmjs.org"
GIVEN = "SAM_DISTILL_ONNXRUNTIME_WEB"
"""Environment variable that names a tarball, for machines without a way out."""

TIMEOUT = 30
"""Seconds without a byte after which a download is given up."""

BLOCK = 1 << 20


def browser_runtime(say: Callable[[str], None]) -> Path:
    """The folder that holds `FILES`, filled on first use.

    Args:
        say: told what is downloaded, once.

    Raises:
        InputError: they are not there and cannot be had, or the tarball is another one.
    """
    folder = cache_folder()
    if _is_filled(folder):
        return folder
    if given := os.environ.get(GIVEN):
        tarball, origin = _read(Path(given).expanduser()), given
    elif (beside := folder.parent / TARBALL).is_file():
        tarball, origin = _read(beside), str(beside)
    else:
        origin = f"{registry()}/{PACKAGE}/-/{TARBALL}"
        tarball = _download(origin, say)
    if "sha512-" + base64.b64encode(hashlib.sha512(tarball).digest()).decode() != INTEGRITY:
        raise InputError(f"{origin} is not {PACKAGE} {VERSION}: its SHA-512 is another one")
    _extract(tarball, origin, folder)
    return folder


def cache_folder() -> Path:
    """Where the files are kept: below `XDG_CACHE_HOME`, or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sam-distill" / f"{PACKAGE}-{VERSION}"


def _is_filled(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def registry() -> str:
    """npm's registry, or the mirror that npm's own environment variable names."""
    named = (os.environ.get(name) for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"))
    return next(filter(None, named), REGISTRY).rstrip("/")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _download(address: str, say: Callable[[str], None]) -> bytes:
    """A file from the network; another tarball than ours does not fill the memory."""
    limit, held, began = 64 << 20, io.BytesIO(), time.monotonic()
    say(f"export: {PACKAGE} {VERSION} from {address} ...")
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            while (block := answer.read(BLOCK)) and held.tell() <= limit:
                held.write(block)
    except (OSError, ValueError) as error:  # no network, no such host, not found, a registry that is no address
        reason: object = first_line(error)
        if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
            reason = error.reason
        raise InputError(
            f"{PACKAGE} {VERSION} cannot be downloaded from {address}: {reason}; "
            f"put {TARBALL} into {cache_folder().parent}, or name it with {GIVEN}=FILE"
        ) from error
    say(f"export: {PACKAGE}: {held.tell() / 1e6:.0f} MB in {time.monotonic() - began:.0f} s")
    return held.getvalue()


def _extract(tarball: bytes, origin: str, folder: Path) -> None:
    """Write `FILES` and nothing else of a tarball, all of them or none."""
    temporary = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    try:
        temporary.mkdir(parents=True)
        with tarfile.open(fileobj=io.BytesIO(tarball), mode="r:gz") as tar:
            for name in FILES:
                member = tar.extractfile(f"package/dist/{name}")
                if member is None:
                    raise InputError(f"{origin}: {name} is no file")
                with member, (temporary / name).open("wb") as file:
                    shutil.copyfileobj(member, file)
        if folder.exists():  # of a cache that somebody emptied in part
            shutil.rmtree(folder)
        publish(temporary, folder)
    except (KeyError, tarfile.TarError) as error:
        raise InputError(f"{origin} is not {PACKAGE} {VERSION}: {first_line(error)}") from error
    except OSError as error:
        if not _is_filled(folder):  # by another process at the same time
            raise InputError(f"{folder} cannot be written: {error.strerror or first_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
