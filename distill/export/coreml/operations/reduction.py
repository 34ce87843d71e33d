"""Along some axes: means, sums, extremes."""

from torch import Tensor

from distill.export.coreml.operations.registry import axes_of, operation


@operation(floats=True)
def reduce_mean(x: Tensor, keep_dims: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.mean(axes_of(x, axes), keepdim=bool(keep_dims))


@operation()
def reduce_sum(x: Tensor, keep_dims: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.sum(axes_of(x, axes), keepdim=bool(keep_dims), dtype=x.dtype)


@operation()
def reduce_max(x: Tensor, keep_dims: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.amax(axes_of(x, axes), keepdim=bool(keep_dims))


@operation()
def reduce_min(x: Tensor, keep_dims: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.amin(axes_of(x, axes), keepdim=bool(keep_dims))


@operation("reduce_argmax", output_dtype=("int32",))
def reduce_argmax(x: Tensor, axis: Tensor, keep_dims: Tensor, output_dtype: str = "int32") -> Tensor:
    return x.argmax(int(axis), keepdim=bool(keep_dims)).int()


@operation("cumsum", exclusive=(False,), reverse=(False,))
def cumsum(x: Tensor, axis: Tensor, exclusive: Tensor, reverse: Tensor) -> Tensor:
    return x.cumsum(int(axis), dtype=x.dtype)
