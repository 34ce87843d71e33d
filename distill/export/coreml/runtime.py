"""A package run by Core ML itself, where there is one."""

import platform
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from distill.export.coreml.package import check_inputs, inputs_of, open_package, require_coremltools
from distill.export.coreml.program import MilProgram
from students import InputError


def runtime_available() -> bool:
    """Whether Core ML itself can run here: on macOS."""
    return platform.system() == "Darwin"


class CoremlRuntime:
    """A package run by Core ML itself, on the device that it chooses; called as `MilProgram` is.

    Raises:
        InputError: this is not macOS, or as for `MilProgram`.
    """

    def __init__(self, package: Path) -> None:
        if not runtime_available():
            raise InputError("Core ML runs on macOS only")
        self.package = package
        self.inputs = inputs_of(package, open_package(package)[1])
        self.model = require_coremltools().models.MLModel(str(package))

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """By name; floats as float32."""
        check_inputs(self.package, self.inputs, inputs)
        given = {
            name: Image.fromarray(array[0].transpose(1, 2, 0).astype(np.uint8)) if self.inputs[name].image else array
            for name, array in inputs.items()
        }
        predicted = {name: np.asarray(value) for name, value in self.model.predict(given).items()}
        return {name: made if made.dtype.kind in "iub" else made.astype(np.float32) for name, made in predicted.items()}


Program = MilProgram | CoremlRuntime
"""A package that runs, one way or the other."""
