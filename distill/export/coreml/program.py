"""A Core ML file's numbers without a Mac: its program, as it was saved, run by torch on the CPU.

coremltools predicts on macOS alone. What is run here is read back from the package: quantised weights, the order of
operations and the float16 between them are the file's, not those of the model that it was made from.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.export.coreml.operations import OPERATIONS, Operation
from distill.export.coreml.package import check_inputs, inputs_of, open_package
from students import InputError, first_line

Value = torch.Tensor | str


@dataclass(frozen=True)
class Step:
    """One operation; values go by number."""

    label: str
    operation: Operation
    inputs: dict[str, int | list[int]]
    outputs: list[int]
    dtypes: list[str]
    shapes: list[list[int | None] | None]
    """As declared by the file; None where it is open."""
    done: list[int]
    """Values that no later step needs."""


class MilProgram:
    """A saved Core ML package (ML Program) as something that torch runs, operation by operation.

    Within an operation numbers are float32, as are its sums; a device may add up in another order or in float16.

    Args:
        package: path of the .mlpackage.
        float16: round what an operation returns to float16 where the file says so, so that overflow and underflow
            show. False: compute in float32 throughout, from the weights that the file holds.

    Raises:
        InputError: coremltools is not installed, this is no ML Program, or it has operations, inputs of theirs or
            values of them that `operations` does not cover. They are named.
    """

    def __init__(self, package: Path, float16: bool = True) -> None:
        self.package = package
        self.float16 = float16
        model, spec = open_package(package)
        self.inputs = inputs_of(package, spec)
        if images := [each.name for each in spec.description.output if each.type.WhichOneof("Type") == "imageType"]:
            raise InputError(f"{package.name}: output {images[0]} is an image, which is not supported")
        function = _function(package, model, spec)
        numbers: dict[Any, int] = defaultdict(count().__next__)
        self._places = {name: numbers[function.inputs[name]] for name in self.inputs}
        self._outputs = {var.name: numbers[var] for var in function.outputs}
        self._constants: dict[int, Value] = {}
        self._steps = self._plan(function.operations, numbers)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the program.

        Args:
            inputs: by name. An image is RGB (1, 3, H, W), whole numbers 0-255, uint8 or float; other inputs have the
                shape and kind (integer or float) that the package says.

        Returns:
            By name, float32 (where the file says float16, numbers that fit it), int32 or bool.

        Raises:
            InputError: an input that is missing, unknown, or of a shape, kind or range that the package does not take.
        """
        check_inputs(self.package, self.inputs, inputs)
        values = dict(self._constants)
        for name, place in self._places.items():
            values[place] = self._stored(_tensor(np.asarray(inputs[name])), self.inputs[name].dtype)
        for step in self._steps:
            self._run(step, values)
            for number in step.done:
                del values[number]
        return {name: values[number].numpy().copy() for name, number in self._outputs.items()}  # type: ignore[union-attr]

    def _stored(self, value: torch.Tensor, dtype: str) -> torch.Tensor:
        """A value as the program holds it: float32 here, with the numbers of float16 where that is its type."""
        if dtype in ("fp16", "fp32"):
            return value.half().float() if dtype == "fp16" and self.float16 else value.float()
        return value.to(torch.bool if dtype == "bool" else torch.int32)

    def _plan(self, operations: list[Any], numbers: Mapping[Any, int]) -> list[Step]:
        """Constants into `_constants`, compressed weights unpacked; the rest as steps."""
        steps = []
        for op in operations:
            if op.op_type == "const":
                value = op.outputs[0].val
                self._constants[numbers[op.outputs[0]]] = value if isinstance(value, str) else _tensor(value)
                continue
            step = self._step(op, numbers)
            if op.op_type.startswith("constexpr_"):
                self._run(step, self._constants)
                # A weight is stored in its type even where nothing else is rounded.
                for number, dtype in zip(step.outputs, step.dtypes, strict=True):
                    weight = self._constants[number]
                    assert isinstance(weight, torch.Tensor)
                    self._constants[number] = weight.half().float() if dtype == "fp16" else weight
            else:
                steps.append(step)
        needed = set(self._outputs.values())
        for step in reversed(steps):
            used = set(step.outputs).union(*(_listed(places) for places in step.inputs.values()))
            step.done.extend(used - needed)
            needed |= used
        self._constants = {number: value for number, value in self._constants.items() if number in needed}
        return steps

    def _step(self, op: Any, numbers: Mapping[Any, int]) -> Step:
        operation, given = OPERATIONS[op.op_type], {name: var for name, var in op.inputs.items() if var is not None}
        label = f"{self.package.name}: {op.op_type} {op.outputs[0].name}"
        for name, var in given.items():
            if name not in operation.inputs:
                raise InputError(f"{label}: its input {name} is not supported")
            if name in operation.allowed and var.val not in operation.allowed[name]:
                raise InputError(f"{label}: {name}={var.val} is not supported")
            if operation.floats and name in ("x", "y") and _dtype(var) == "int32":
                raise InputError(f"{label}: of integers is not supported")
        return Step(
            label,
            operation,
            {
                name: [numbers[v] for v in var] if isinstance(var, list | tuple) else numbers[var]
                for name, var in given.items()
            },
            [numbers[var] for var in op.outputs],
            [_dtype(var) for var in op.outputs],
            [_declared_shape(var) for var in op.outputs],
            [],
        )

    def _run(self, step: Step, values: dict[int, Value]) -> None:
        arguments = {
            name: [values[n] for n in numbers] if isinstance(numbers, list) else values[numbers]
            for name, numbers in step.inputs.items()
        }
        try:
            results = step.operation.run(**arguments)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise RuntimeError(f"{step.label}: {first_line(error)}") from error
        results = results if isinstance(results, tuple) else (results,)
        for number, result, dtype, shape in zip(step.outputs, results, step.dtypes, step.shapes, strict=True):
            if shape is not None and not _fits(result.shape, shape):
                raise RuntimeError(f"{step.label}: made {tuple(result.shape)}, where the file says {shape}")
            values[number] = self._stored(result, dtype)


def _function(package: Path, model: Any, spec: Any) -> Any:
    """The one function of a package, in coremltools' classes."""
    from coremltools.converters.mil.frontend.milproto.load import load

    if spec.WhichOneof("Type") != "mlProgram" or len(spec.mlProgram.functions) != 1:
        raise InputError(f"{package} is no ML Program of one function")
    (function,) = spec.mlProgram.functions.values()
    types = {op.type for op in function.block_specializations[function.opset].operations}
    if unknown := sorted(types - OPERATIONS.keys() - {"const"}):
        raise InputError(f"{package} has operations that are not supported: {', '.join(unknown)}")
    try:
        program = load(spec, spec.specificationVersion, model.weights_dir)
    except Exception as error:
        raise InputError(f"{package} cannot be read: {first_line(error)}") from error
    (function,) = program.functions.values()
    return function


def _fits(shape: tuple[int, ...], declared: list[int | None]) -> bool:
    return len(shape) == len(declared) and all(d in (None, size) for size, d in zip(shape, declared, strict=True))


def _listed(numbers: int | list[int]) -> list[int]:
    return numbers if isinstance(numbers, list) else [numbers]


def _dtype(var: Any) -> str:
    """fp16, fp32, bool, or int32 for every integer."""
    from coremltools.converters.mil.mil.types import builtin_to_string

    name = builtin_to_string(var.dtype)
    return name if name in ("fp16", "fp32", "bool") else "int32"


def _declared_shape(var: Any) -> list[int | None] | None:
    from coremltools.converters.mil.mil.types.symbolic import any_variadic, is_symbolic

    if any_variadic(var.shape):
        return None
    return [None if is_symbolic(size) else int(size) for size in var.shape]


def _tensor(array: np.ndarray) -> torch.Tensor:
    """float32, int32 or bool."""
    array = np.asarray(array)
    kinds = {"f": np.float32, "b": np.bool_}
    return torch.from_numpy(np.array(array, kinds.get(array.dtype.kind, np.int32)))
