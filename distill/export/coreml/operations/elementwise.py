"""One number in, one out: functions, comparisons, types, softmax."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.export.coreml.operations.registry import operation
from students import InputError

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp": torch.exp,
    "floor": torch.floor,
    "identity": torch.clone,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tanh": torch.tanh,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": torch.floor_divide,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "sub": torch.sub,
}


def _of_one(run: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x: run(x)


def _of_two(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, y: run(x, y)


for _name, _unary in UNARY.items():
    operation(_name)(_of_one(_unary))
for _name, _binary in BINARY.items():
    operation(_name)(_of_two(_binary))


@operation("cast", dtype=("int32", "fp16", "fp32", "bool"))
def cast(x: Tensor, dtype: str) -> Tensor:
    """Floats become integers towards 0. The rounding to fp16 is that of every fp16 result, done by the caller."""
    return x.to({"int32": torch.int32, "bool": torch.bool}.get(dtype, torch.float32))


@operation()
def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return x.clamp(alpha, beta)


@operation(floats=True)
def pow(x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y)


@operation()
def real_div(x: Tensor, y: Tensor) -> Tensor:
    """Of integers, an integer; which one, MIL leaves open where the division leaves a rest."""
    if x.is_floating_point():
        return x / y
    if (x % y).any():
        raise InputError("real_div of integers that leaves a rest is not supported")
    return x // y


@operation("gelu", mode=("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"))
def gelu(x: Tensor, mode: str) -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


@operation()
def inverse(x: Tensor, epsilon: Tensor) -> Tensor:
    return 1 / (x + epsilon)


@operation()
def log(x: Tensor, epsilon: Tensor) -> Tensor:
    return torch.log(x + epsilon)


@operation()
def rsqrt(x: Tensor, epsilon: Tensor) -> Tensor:
    return 1 / torch.sqrt(x + epsilon)


@operation()
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


@operation()
def sigmoid_hard(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


@operation()
def thresholded_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= alpha, x, 0)


@operation()
def softmax(x: Tensor, axis: Tensor) -> Tensor:
    return torch.softmax(x, int(axis))
