"""How an operation is registered, and what its parameters are read with."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Operation:
    """A function of torch tensors, and what of MIL's operation it covers."""

    run: Callable[..., Any]
    inputs: Collection[str]
    allowed: Mapping[str, Collection[Any]]
    """Values that a constant input may have; any, where an input is not listed."""
    floats: bool
    """Whether integers are refused, for which MIL leaves open what comes out."""


OPERATIONS: dict[str, Operation] = {}


def operation(*names: str, floats: bool = False, **allowed: Collection[Any]) -> Callable[[Any], Any]:
    """Register a function under its own name, or others."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        for name in names or (run.__name__,):
            OPERATIONS[name] = Operation(run, frozenset(inspect.signature(run).parameters), allowed, floats)
        return run

    return register


def ints(values: Tensor) -> list[int]:
    """Plain numbers."""
    return [int(value) for value in values.reshape(-1)]


def axes_of(x: Tensor, axes: Tensor | None) -> list[int]:
    """Axes from 0 on, in order; all of `x` where none are given."""
    return sorted(axis % x.dim() for axis in ints(axes)) if axes is not None else list(range(x.dim()))
