"""Packages that are directories: whole or absent, and what identifies them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256 as new_digest
from pathlib import Path

from embeddings_cache.system import TEMPORARY, publish, sha256


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the same suffix; on success it becomes `path`, on failure it is removed. What is in
    it can be read by whoever gets it: coremltools and safetensors keep some of their files to their maker."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    remove(temporary)
    try:
        yield temporary
        for member in temporary.rglob("*"):
            member.chmod(0o755 if member.is_dir() else 0o644)
        remove(path)
        publish(temporary, path)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file or directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file; of a directory, that of `sha256sum`'s lines for its files, sorted by path:
    `cd PATH && find . -type f ! -path '*/__pycache__/*' | LC_ALL=C sort | xargs sha256sum | sha256sum`."""
    if path.is_file():
        return sha256(path)
    lines = [f"{sha256(member)}  ./{member.relative_to(path).as_posix()}\n" for member in _members(path)]
    return new_digest("".join(lines).encode()).hexdigest()


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a directory."""
    return sum(member.stat().st_size for member in ([path] if path.is_file() else _members(path)))


def _members(directory: Path) -> list[Path]:
    found = [path for path in directory.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    return sorted(found, key=lambda path: path.relative_to(directory).as_posix().encode())
