"""Core ML packages of a few operations, made by coremltools, and what comes out of them by another road."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distill.export.coreml.operations import OPERATIONS
from distill.export.coreml.program import MilProgram

ct = pytest.importorskip("coremltools")
mb = ct.converters.mil.Builder
types = ct.converters.mil.mil.types
Program, Function = ct.converters.mil.mil.Program, ct.converters.mil.mil.Function
sliding_window_view = np.lib.stride_tricks.sliding_window_view

Arrays = dict[str, np.ndarray]

random = np.random.default_rng(0)
X = random.normal(size=(2, 3, 5, 4)).astype(np.float32)
POSITIVE = np.abs(X) + 0.1
W = random.normal(size=(4, 3, 3, 2)).astype(np.float32)
BIAS = random.normal(size=4).astype(np.float32)
GAMMA, BETA, MEAN = random.normal(size=(3, 3)).astype(np.float32)
VARIANCE = random.uniform(0.5, 2, 3).astype(np.float32)
INDICES = np.array([2, 0, -1], np.int32)
SIZES = np.array([6, 0, -1], np.int32)
RAMP = np.arange(2, dtype=np.float32).reshape(1, 1, 1, 2)
erf = np.vectorize(math.erf)


def save_program(
    path: Path, body: Callable[..., Any], inputs: Mapping[str, np.ndarray], half: bool = False, target: Any = None
) -> Path:
    """A package of one MIL program; no pass of coremltools may fold or replace the operations in it."""
    target = target or ct.target.iOS16
    dtypes = {"f": types.fp32, "i": types.int32}
    with Function(
        {k: mb.placeholder(shape=v.shape, dtype=dtypes[v.dtype.kind]) for k, v in inputs.items()}, target
    ) as function:
        results = body(**function.inputs)
        function.set_outputs(list(results) if isinstance(results, list | tuple) else [results])
    program = Program()
    program.add_function("main", function)
    pipeline = ct.PassPipeline.EMPTY
    if half:
        pipeline.append_pass("common::add_fp16_cast")
    convert(path, program, pass_pipeline=pipeline, minimum_deployment_target=target)
    return path


def convert(path: Path, source: Any, **options: Any) -> Any:
    options = {"minimum_deployment_target": ct.target.iOS16, **options}
    model = ct.convert(source, convert_to="mlprogram", skip_model_load=True, **options)
    model.save(str(path))
    return model


def trace(module: nn.Module, example: tuple[torch.Tensor, ...], dynamic_shapes: Any = None) -> Any:
    return torch.export.export(module.eval(), example, dynamic_shapes=dynamic_shapes).run_decompositions({})


def operations(path: Path) -> set[str]:
    function = ct.models.MLModel(str(path), skip_model_load=True).get_spec().mlProgram.functions["main"]
    return {op.type for op in function.block_specializations[function.opset].operations}


@dataclass
class Case:
    """A program around one operation, its inputs, and what comes out by another road."""

    operation: str
    body: Callable[..., Any]
    inputs: Arrays
    expected: Callable[..., Any]
    target: Any = None


def padded(x: np.ndarray, *sides: tuple[int, int], value: float = 0.0) -> np.ndarray:
    return np.pad(x, [(0, 0)] * (x.ndim - len(sides)) + list(sides), constant_values=value)


def channels(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, 1, 1)


def normalized(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> np.ndarray:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def check_case(case: Case, folder: Path) -> None:
    """The operation is in the file, and makes what is expected."""
    path = save_program(folder / "m.mlpackage", case.body, case.inputs, target=case.target)
    assert case.operation in operations(path)
    expected = case.expected(*case.inputs.values())
    results = list(MilProgram(path, float16=False)(case.inputs).values())
    for result, wanted in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert result.dtype == (np.int32 if wanted.dtype == np.int32 else np.float32)
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)


def each(cases: list[Case]) -> Any:
    """Parametrises a test by its cases."""
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=f"{number}-{case.operation}") for number, case in enumerate(cases)]
    )


def operations_of(kind: str) -> set[str]:
    """Names of the operations that a module of `operations/` covers."""
    module = f"distill.export.coreml.operations.{kind}"
    return {name for name, operation in OPERATIONS.items() if operation.run.__module__ == module}
