"""The Swift package of an export, built and run: `swift` of the PATH, or the command that $SWIFT names."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.export.subject import Subject
from distill.export.swift import write_swift
from exports import small_student, toy
from students import build_student_sam
from support import ROOT

PACKAGE = ROOT / "distill" / "clients" / "swift"

SWIFT = shlex.split(os.environ.get("SWIFT", "")) or [found for found in [shutil.which("swift")] if found]

needs_swift = pytest.mark.skipif(not SWIFT, reason="needs Swift (the command swift, or what $SWIFT names)")

MANIFEST = """// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "driver",
    platforms: [.macOS(.v13)],
    dependencies: [.package(path: "../swift")],
    targets: [
        .executableTarget(name: "driver", dependencies: [.product(name: "SegmentAnything", package: "swift")])
    ]
)
"""


def swift(directory: Path, *arguments: str, timeout: float = 600, environment: dict[str, str] | None = None) -> str:
    """Runs `swift ARGUMENTS` in a package; what it printed."""
    command = [*SWIFT, *arguments]
    known = {**os.environ, **(environment or {})}
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=timeout, env=known)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def driver(directory: Path, code: str) -> Path:
    """A program that uses the package as an app does, built with optimisation: `swift run` in what is returned."""
    package = directory / "driver"
    (package / "Sources" / "driver").mkdir(parents=True)
    (package / "Package.swift").write_text(MANIFEST)
    (package / "Sources" / "driver" / "main.swift").write_text(code)
    shutil.copytree(PACKAGE, directory / "swift", dirs_exist_ok=True)
    swift(package, "build", "-c", "release")
    return package


SOURCES = ROOT / "tests" / "data" / "swift"
"""Programs that use the package."""

APPLE = ROOT / "tests" / "data" / "apple"
"""Stand-ins for Apple's frameworks, in the order in which they need each other."""
FRAMEWORKS = {
    "CoreGraphics": (),
    "CoreVideo": ("CoreGraphics",),
    "ImageIO": ("CoreGraphics",),
    "CoreML": ("CoreVideo",),
}


def on_stand_ins(package: Path, code: str) -> None:
    """Gives a package, as an export has it, the stand-ins as its frameworks, and a further program `driver`."""
    manifest = (package / "Package.swift").read_text()
    target = '.target(\n            name: "SegmentAnything",'
    assert target in manifest
    stands = [
        f'.target(name: "{name}", dependencies: {json.dumps(needs)}, path: "apple/{name}"),\n        '
        for name, needs in FRAMEWORKS.items()
    ]
    stands.append('.executableTarget(name: "driver", dependencies: ["SegmentAnything"]),\n        ')
    needed = f"{target} dependencies: {json.dumps(list(FRAMEWORKS))},"
    (package / "Package.swift").write_text(manifest.replace(target, "".join(stands) + needed))
    shutil.copytree(APPLE, package / "apple")
    (package / "Sources" / "driver").mkdir()
    (package / "Sources" / "driver" / "main.swift").write_text(code)


def written(directory: Path) -> Path:
    """The folder that an export of a small student has."""
    student = small_student()
    subject = Subject("small", "toy", None, student, student, build_student_sam(student, toy()), None)
    write_swift(directory / "swift", subject, ("SmallEncoder.mlpackage", "SmallDecoder.mlpackage"))
    return directory / "swift"


def stored(picture: np.ndarray, order: str, gap: int) -> bytes:
    """RGB (H, W, 3) as an app has it: four bytes a pixel, the fourth of which means nothing, and a gap between rows."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (picture.shape[0], picture.shape[1] * 4 + gap), dtype=np.uint8)
    pixels = rows[:, : picture.shape[1] * 4].reshape(*picture.shape[:2], 4)
    pixels[..., :3] = picture if order == "rgba" else picture[..., ::-1]
    rows[:, : picture.shape[1] * 4] = pixels.reshape(picture.shape[0], -1)
    return rows.tobytes()


PROMPTS: tuple[dict[str, Any], ...] = (
    {"points": [[0.4, 0.5]], "labels": [1]},
    {"points": [[0.4, 0.5]], "labels": [0]},
    {"box": [0.2, 0.1, 0.8, 0.9]},
    {"points": [[0.4, 0.5]], "labels": [1], "box": [0.2, 0.1, 0.8, 0.9]},
    {"points": [[0.4, 0.5], [0.8, 0.7], [-0.2, 1.1]], "labels": [1, 0, 1]},
)
"""In shares of the picture's width and height."""
