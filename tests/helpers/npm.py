"""Packages of npm, for tests of what runs in Node and in browsers."""

import shutil
import subprocess
from pathlib import Path

import pytest

needs_node = pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="needs Node and npm")


def npm_install(directory: Path, *packages: str) -> Path:
    """Install what `package.json` of a directory asks for, and these packages; returns `node_modules`. Scripts of
    packages are not run: one would download CUDA's libraries."""
    if not (directory / "package.json").exists():
        (directory / "package.json").write_text("{}")
    command = [shutil.which("npm") or "npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return directory / "node_modules"
