"""From a picture of any size to what an encoder takes, inside the encoder: labelling programs hand over the picture.

`Resize` cannot do it: it antialiases from opset 18 on only, and does not round between its passes. So Pillow's filter
is written in operators, in its own fixed-point arithmetic, and comes out as Pillow's, bit for bit, without float64.
"""

# The functions below are ONNX Script, another language that reads like Python: text in a type names a dimension.
# ruff: noqa: F821
# mypy: ignore-errors

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions
from onnxscript import FLOAT, INT64, UINT8, script
from onnxscript import opset17 as op

from embeddings_cache.images import PIXEL_MEAN

PICTURE = "input_image"
"""The one input, by the name that samexporter gave it."""


@script(default_opset=op)
def filter_weights(
    positions: INT64["blocks", 1, "taps"], places: INT64["blocks", 16, 1], old: INT64[1], new: INT64[1]
) -> FLOAT["blocks", 32, "taps"]:
    """How much each of `old` pixels counts in each of `new` ones, in 22 bits as Pillow has it: their upper halves, and
    below these the lower ones, so that a float32 sum of products with grey levels is exact.

    A triangle around the new pixel's centre, which reaches as far as new pixels or old ones are apart, whichever is
    more. On a picture that is twice old × new units long, every centre is a whole number.
    """
    zero, one, two = op.Constant(value_int=0), op.Constant(value_int=1), op.Constant(value_int=2)
    apart = op.Abs((positions * two + one) * new - (places * two + one) * old)
    there = op.And(op.GreaterOrEqual(positions, zero), op.Less(positions, old))
    heights = op.Where(there, op.Max(op.Max(old, new) * two - apart, zero), zero)
    sums = op.Max(op.ReduceSum(heights, op.Constant(value_ints=[-1])), one)
    weights = (heights * op.Constant(value_int=8388608) + sums) / (sums * two)  # 2²² × share, rounded
    half = op.Constant(value_int=2048)
    upper = weights / half
    return op.Cast(op.Concat(upper, weights - upper * half, axis=1), to=FLOAT.dtype)


@script(default_opset=op)
def resample(pixels: UINT8["old", "rest"], new: INT64[1]) -> UINT8["new", "rest"]:
    """One pass of Pillow's `Image.resize(..., BILINEAR)`, along the first axis.

    Sixteen new pixels at a time are a matrix product with the old ones near them: 1,024 of 4,000 take a fiftieth of the
    work that one matrix for all would.
    """
    zero, one, two = op.Constant(value_int=0), op.Constant(value_int=1), op.Constant(value_int=2)
    block, axis = op.Constant(value_int=16), op.Constant(value_ints=[0])
    old = op.Shape(pixels, end=1)
    reach = op.Max(old, new) / new + one
    blocks = (new + block - one) / block
    taps = block * old / new + reach * two + one
    starts = op.Reshape(op.Range(zero, op.Squeeze(blocks), one) * block, op.Constant(value_ints=[-1, 1, 1]))
    places = starts + op.Reshape(op.Range(zero, block, one), op.Constant(value_ints=[-1, 1]))
    positions = (starts * two + one) * old / (new * two) - reach + op.Range(zero, op.Squeeze(taps), one)
    near = op.Min(op.Max(positions, zero), old - one)
    windows = op.Cast(op.Gather(pixels, op.Squeeze(near, op.Constant(value_ints=[1])), axis=0), to=FLOAT.dtype)
    sums = op.MatMul(filter_weights(positions, places, old, new), windows)
    upper, lower = op.Split(sums, op.Constant(value_ints=[16, 16]), axis=1)
    half = op.Constant(value_float=2048.0)
    levels = (upper + op.Floor(lower / half)) / half
    rounded = op.Cast(levels + op.Constant(value_float=0.5), to=UINT8.dtype)
    rows = op.Reshape(rounded, op.Concat(blocks * block, op.Constant(value_ints=[-1]), axis=0))
    return op.Slice(rows, axis, new, axis)


@script(default_opset=op)
def preprocess(
    picture: UINT8["image_height", "image_width", 3], side: INT64[1], colour: FLOAT[1, 3, 1, 1]
) -> FLOAT[1, 3, "side", "side"]:
    """As segment-anything's `ResizeLongestSide` resizes, columns before rows, and padded with a colour.

    Of n pixels beside L, ⌊n·S/L + ½⌋ are left, and one at least. segment-anything computes that in float64, which
    rounds some halves down where S is no power of two: such a picture has a row less there, of hundreds.
    """
    zero, one, two = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    old = op.Shape(picture, end=2)
    longest = op.ReduceMax(old)
    new = op.Max((old * side * two + longest) / (longest * two), one)
    height, width = op.Slice(new, zero, one), op.Slice(new, one, two)
    flat, pixels = op.Constant(value_ints=[0, -1]), op.Constant(value_ints=[-1, 3])
    columns = resample(op.Reshape(op.Transpose(picture, perm=[1, 0, 2]), flat), width)
    narrow = op.Transpose(op.Reshape(columns, op.Concat(width, pixels, axis=0)), perm=[1, 0, 2])
    rows = resample(op.Reshape(narrow, flat), height)
    small = op.Transpose(op.Reshape(rows, op.Concat(height, pixels, axis=0)), perm=[2, 0, 1])
    ends = op.Concat(op.Constant(value_ints=[0, 0, 0, 0]), side - height, side - width, axis=0)
    padded = op.Pad(op.Cast(small, to=FLOAT.dtype), ends)
    places = op.Range(op.Constant(value_int=0), op.Squeeze(side), op.Constant(value_int=1))
    there = op.And(op.Less(op.Reshape(places, op.Constant(value_ints=[-1, 1])), height), op.Less(places, width))
    return op.Where(there, padded, colour)


def prepend_preprocessing(model: onnx.ModelProto, size: int, uint8: bool = False) -> onnx.ModelProto:
    """Let an encoder take pictures as they are: one input `input_image`, RGB (H, W, 3) of any height and width.

    Inside, the longest side is resized to `size` as segment-anything's `ResizeLongestSide` does with Pillow, and the
    rest padded with SAM's mean colour. Pillow 13 takes the rows first where the height loses more than twice what the
    width does; here columns always come first, as they did before: a difference of up to one grey level.

    Args:
        model: of opset 17 or later; input `image`, float32 (1, 3, size, size), RGB 0–255, padded with the mean colour;
            it stays as it is.
        size: S, side of what the encoder takes, in pixels.
        uint8: of the picture's values; else float32, whole numbers from 0 to 255.

    Raises:
        ValueError: the encoder takes something else.
    """
    (image,) = model.graph.input
    shape = [dimension.dim_value for dimension in image.type.tensor_type.shape.dim]
    if image.name != "image" or shape[1:] != [3, size, size]:
        raise ValueError(f"the encoder takes {image.name} {shape}, not image [1, 3, {size}, {size}]")
    head = inline_local_functions(preprocess.to_model_proto()).graph
    kept = {"": "", head.output[0].name: image.name}
    if uint8:
        kind, nodes, kept["picture"] = TensorProto.UINT8, [], PICTURE
    else:
        cast = helper.make_node("Cast", [PICTURE], ["preprocess_picture"], to=TensorProto.UINT8)
        kind, nodes = TensorProto.FLOAT, [cast]
    for node in head.node:
        node.name = f"preprocess_{node.name}"
        for names in (node.input, node.output):
            names[:] = [kept.get(name, f"preprocess_{name}") for name in names]
        nodes.append(node)
    joined = onnx.ModelProto()
    joined.CopyFrom(model)
    graph = joined.graph
    constants = {"side": np.array([size]), "colour": np.array(PIXEL_MEAN, np.float32).reshape(1, 3, 1, 1)}
    graph.initializer.extend(numpy_helper.from_array(value, f"preprocess_{name}") for name, value in constants.items())
    del graph.node[:], graph.input[:]
    graph.node.extend([*nodes, *model.graph.node])
    graph.input.append(helper.make_tensor_value_info(PICTURE, kind, ["image_height", "image_width", 3]))
    graph.value_info.append(image)
    onnx.checker.check_model(joined, full_check=True)
    return joined
