"""Answers for the stand-in of Core ML that `tests/data/apple` has for Swift: packages run operation by operation."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from distill.export.coreml.package import inputs_of, open_package
from distill.export.coreml.program import MilProgram


def stand_in(package: Path, directory: Path, outputs: dict[str, list[int]]) -> Path:
    """What Swift takes for a package: a folder of its name that says what goes in and comes out.

    Args:
        package: a real one.
        directory: where the folder goes.
        outputs: shapes, which a package does not say.
    """
    about = inputs_of(package, open_package(package)[1])
    names = {"fp16": "float16", "fp32": "float32"}
    inputs = {
        name: {"shape": [side.start for side in each.shapes[0]], "dtype": "image" if each.image else names[each.dtype]}
        for name, each in about.items()
    }
    made = {name: {"shape": shape, "dtype": "float16"} for name, shape in outputs.items()}
    folder = directory / package.name
    folder.mkdir(parents=True)
    (folder / "description.json").write_text(json.dumps({"inputs": inputs, "outputs": made}))
    return folder


@contextmanager
def answering(folder: Path, packages: list[Path]) -> Iterator[list[str]]:
    """Predictions of these packages for whoever asks in a folder; yields the names of those asked, in order."""
    programs = {package.stem: MilProgram(package) for package in packages}
    folder.mkdir()
    done, asked = threading.Event(), list[str]()

    def answer() -> None:
        while not done.wait(0.002):
            for question in [path.parent for path in folder.glob("*/asked") if not (path.parent / "answered").exists()]:
                name = (question / "asked").read_text().partition("-")[0]
                program = programs[name]
                asked.append(name)
                given = {}
                for key, about in program.inputs.items():
                    shape = [side.start for side in about.shapes[0]]
                    if about.image:
                        pixels = np.fromfile(question / key, np.uint8).reshape(shape[2], shape[3], 4)
                        given[key] = pixels[None, ..., 2::-1].transpose(0, 3, 1, 2)
                    else:
                        kind = np.float16 if about.dtype == "fp16" else np.float32
                        given[key] = np.fromfile(question / key, kind).reshape(shape)
                for key, values in program(given).items():
                    np.asarray(values, np.float16).tofile(question / key)
                (question / "answered").touch()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield asked
    finally:
        done.set()
        thread.join()
