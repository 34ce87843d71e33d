"""Why a shard cannot be read: for what is in it, which is damage, or for something that passes."""

import errno
import os
import re
from pathlib import Path

import h5py

from students import first_line

REMEDIES = {
    errno.EMFILE: "raise the limit: ulimit -n 4096",
    errno.ENFILE: "the machine's limit, fs.file-max",
    errno.EACCES: "look at its permissions",
    errno.EPERM: "look at its permissions",
    errno.ESTALE: "mount the network's file system again",
    errno.EIO: "look at the disk: dmesg",
}


def open_shard(path: Path) -> h5py.File:
    """A shard to read from.

    HDF5 takes no lock on it: a shard is never written to under its name, some file systems have no locks, and whoever
    holds one would only keep us from reading.

    Raises:
        OSError: and what else h5py raises for a damaged file.
    """
    return h5py.File(path, "r", locking=False)


def passing_trouble(error: Exception) -> str | None:
    """What the system said, and what helps; None where it is not the system that complains, but HDF5 of the content.

    HDF5 repeats the system's error number in its text; h5py gives it to exceptions of some kinds alone.
    """
    if isinstance(error, MemoryError):
        return "memory does not suffice"
    said = re.search(r"errno = (\d+)", str(error))
    number = (error.errno if isinstance(error, OSError) else None) or (int(said[1]) if said else 0)
    if not number:
        return None
    return os.strerror(number) + (f" ({REMEDIES[number]})" if number in REMEDIES else "")


def damage_of(error: Exception) -> str:
    """What h5py means, in a line."""
    line = first_line(error)
    return "its checksum does not hold" if "filter returned failure" in line else line
