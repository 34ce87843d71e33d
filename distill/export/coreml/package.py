"""A saved Core ML package as coremltools reads it, and what it says of its inputs."""

import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from students import InputError, first_line

ARRAY_TYPES = {"FLOAT16": "fp16", "FLOAT32": "fp32", "INT32": "int32"}
UNLIMITED = 2**31


@dataclass(frozen=True)
class Input:
    """What the package says of one of its inputs."""

    shapes: list[list[range]]
    """Shapes that it takes, each a range of sizes a dimension."""
    image: bool
    """RGB uint8 on a device, which hands it to the program as floats 0-255."""
    dtype: str
    """fp16, fp32 or int32."""


def require_coremltools() -> Any:
    """coremltools, without what it says on import of torch's version and of parts that only a Mac has.

    Raises:
        InputError: it is not installed.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        import coremltools
    except ImportError as error:
        raise InputError("Core ML files need coremltools (pip install coremltools)") from error
    except Exception as error:  # of many kinds, where it is older or newer than a package that it needs
        raise InputError(f"cannot be written: coremltools cannot be imported: {first_line(error)}") from error
    return coremltools


def require_writer() -> None:
    """Raise `InputError` where coremltools is installed without the compiled parts that write packages.

    That is so where there is no wheel of it, for a new Python or another kind of Linux: it still imports and converts.
    """
    version = require_coremltools().__version__
    for part in ("libmilstoragepython", "libmodelpackage"):
        try:
            import_module(f"coremltools.{part}")
        except ImportError as error:
            python = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
            raise InputError(
                f"cannot be written: coremltools {version} has no compiled parts for {python}; "
                "export.formats=onnx,onnx_decoder does without"
            ) from error


def save_package(model: Any, path: Path) -> None:
    """Write a `coremltools` model, without what coremltools notes for debuggers."""
    model.save(str(path))
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)


def open_package(package: Path) -> tuple[Any, Any]:
    """A package as coremltools' model, which is not loaded into Core ML, and as its specification."""
    models = require_coremltools().models
    if not package.is_dir():
        raise InputError(f"{package} is no Core ML package")
    try:
        model = models.MLModel(str(package), skip_model_load=True)
        return model, model.get_spec()
    except Exception as error:  # whatever coremltools raises about a file
        raise InputError(f"{package} cannot be read: {first_line(error)}") from error


def check_inputs(package: Path, expected: Mapping[str, Input], given: Mapping[str, np.ndarray]) -> None:
    """Raise `InputError` unless arrays are what a package takes."""
    if missing := expected.keys() - given.keys():
        raise InputError(f"{package.name}: input {min(missing)} is missing")
    if unknown := given.keys() - expected.keys():
        raise InputError(f"{package.name} has no input {min(unknown)}; its inputs: {', '.join(expected)}")
    for name, about in expected.items():
        array = np.asarray(given[name])
        if not any(_fits_ranges(array.shape, ranges) for ranges in about.shapes):
            shapes = " or ".join(" × ".join(map(_range_text, ranges)) for ranges in about.shapes)
            raise InputError(f"{package.name}: input {name} has shape {array.shape}, expected {shapes}")
        if about.dtype == "int32" and not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"{package.name}: input {name} has type {array.dtype}, expected integers")
        if about.image and not ((array >= 0) & (array <= 255) & (array == np.round(array))).all():
            raise InputError(f"{package.name}: input {name} is an image, whose values are whole numbers 0-255")


def inputs_of(package: Path, spec: Any) -> dict[str, Input]:
    return {feature.name: _input(package, feature) for feature in spec.description.input}


def _input(package: Path, feature: Any) -> Input:
    kind = feature.type.WhichOneof("Type")
    if kind == "multiArrayType":
        array = feature.type.multiArrayType
        kind = array.ArrayDataType.Name(array.dataType)
        if kind in ARRAY_TYPES:
            return Input(_array_shapes(array), False, ARRAY_TYPES[kind])
    elif kind == "imageType":
        image = feature.type.imageType
        kind = f"{image.ColorSpace.Name(image.colorSpace)} image"
        if image.colorSpace == image.RGB:
            return Input(_image_shapes(image), True, "fp32")
    raise InputError(f"{package.name}: input {feature.name} is of type {kind}, which is not supported")


def _array_shapes(array: Any) -> list[list[range]]:
    flexibility = array.WhichOneof("ShapeFlexibility")
    if flexibility == "shapeRange":
        return [[_range(sizes) for sizes in array.shapeRange.sizeRanges]]
    shapes = array.enumeratedShapes.shapes if flexibility else [array]
    return [[range(size, size + 1) for size in each.shape] for each in shapes]


def _image_shapes(image: Any) -> list[list[range]]:
    flexibility = image.WhichOneof("SizeFlexibility")
    first = [range(1, 2), range(3, 4)]
    if flexibility == "imageSizeRange":
        return [[*first, _range(image.imageSizeRange.heightRange), _range(image.imageSizeRange.widthRange)]]
    sizes = image.enumeratedSizes.sizes if flexibility else [image]
    return [[*first, *(range(size, size + 1) for size in (each.height, each.width))] for each in sizes]


def _range(sizes: Any) -> range:
    return range(sizes.lowerBound, UNLIMITED if sizes.upperBound < 0 else sizes.upperBound + 1)


def _range_text(sizes: range) -> str:
    if len(sizes) == 1:
        return str(sizes[0])
    return f"{sizes[0]} or more" if sizes.stop == UNLIMITED else f"{sizes[0]}-{sizes[-1]}"


def _fits_ranges(shape: tuple[int, ...], ranges: list[range]) -> bool:
    return len(shape) == len(ranges) and all(size in sizes for size, sizes in zip(shape, ranges, strict=True))
