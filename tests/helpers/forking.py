"""`distill.py` in a process of its own that does not import PyTorch first: it is forked from one that has.

What `distill.py` imports takes 6 to 20 s of a core, and the tests start it some forty times. What is launched, killed
or limited is started as a user does, by the tests that do so.
"""

import os
import runpy
import subprocess
import sys
from multiprocessing import get_context, set_start_method
from pathlib import Path
from tempfile import TemporaryDirectory

FORKS = sys.platform == "linux"
"""Elsewhere libraries have threads as soon as they are imported, and a fork has none of them."""

_context = get_context("forkserver" if FORKS else "spawn")
_context.set_forkserver_preload(
    ["distill.main", "distill.stages.evaluate", "distill.stages.export", "distill.stages.report", "onnxscript"]
)


def run_forked(script: Path, arguments: tuple[str, ...], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)`."""
    with TemporaryDirectory() as directory:
        outputs = [Path(directory) / name for name in ("stdout", "stderr")]
        process = _context.Process(target=_enter, args=(script, arguments, cwd, dict(os.environ), outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([str(script), *arguments], timeout)
        said = [output.read_text() for output in outputs]
    return subprocess.CompletedProcess([str(script), *arguments], process.exitcode, *said)


def _enter(
    script: Path, arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], outputs: list[Path]
) -> None:
    set_start_method(None, force=True)  # as in a new process, which has not that of its parent
    for number, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")
