"""File systems that lack something: what stands for them is the system's call, which fails as theirs does."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from embeddings_cache.system.files import sole_user, whole_file
from students import InputError

WITHOUT_FLOCK = """
import errno, fcntl, sys, time
from pathlib import Path
from embeddings_cache.system.files import sole_user

def flock(*arguments):
    raise OSError({number}, "not here")

fcntl.flock = flock
with sole_user(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_has_one_user_too(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(number, "not here")

    script = WITHOUT_FLOCK.format(number=number)
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match="is in use by another run"), sole_user(tmp_path):
        pytest.fail("two users")
    other.send_signal(signal.SIGKILL)
    other.wait()
    for _ in range(2):  # what the killed one left behind is taken over
        with sole_user(tmp_path):
            assert tmp_path.exists()


def test_an_error_of_the_work_within_is_not_the_locks(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the work"), sole_user(tmp_path):
        raise OSError(errno.ENOLCK, "of the work")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES])
def test_a_directory_that_cannot_be_flushed(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, "not here")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with whole_file(tmp_path / "a") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_file_that_could_not_be_flushed_gets_no_name(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(number)), whole_file(tmp_path / "a") as temporary:
        temporary.write_text("whole")
    assert list(tmp_path.iterdir()) == []
