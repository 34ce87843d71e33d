"""What Core ML's operations compute, in torch.

After the descriptions in coremltools' own reference of MIL, the language of a Core ML file
(https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html), iOS 16 and a few of iOS 18.
An operation is a function whose parameters have the names of MIL's inputs. Floats come as float32, integers as int32,
strings as str; what is left out here, an input or a value of one, is refused by the reader of the file, never ignored.
"""

from distill.export.coreml.operations import (
    compressed,
    convolution,
    elementwise,
    matrices,
    normalization,
    reduction,
    resizing,
    shape,
)
from distill.export.coreml.operations.registry import OPERATIONS, Operation

__all__ = [
    "OPERATIONS",
    "Operation",
    "compressed",
    "convolution",
    "elementwise",
    "matrices",
    "normalization",
    "reduction",
    "resizing",
    "shape",
]
