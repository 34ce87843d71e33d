"""From low-resolution masks to masks of the image, as ONNX operators that are right at every size and aspect ratio.

Written in operators rather than exported: `Resize` has to place pixels as PyTorch does (half_pixel, also where a side
is one pixel long), and the padding has to be cut off where `ResizeLongestSide` put it, which computes in float64.
"""

# The functions below are ONNX Script, another language that reads like Python: text in a type names a dimension.
# ruff: noqa: F821
# mypy: ignore-errors

import onnx
from onnx.inliner import inline_local_functions
from onnxscript import DOUBLE, FLOAT, INT64, UINT8, script
from onnxscript import opset20 as op


@script()
def upscale(low_res_masks: FLOAT[1, "M", "h", "w"], orig_im_size: FLOAT[2]) -> FLOAT[1, "M", "H", "W"]:
    """`Sam.postprocess_masks`: to the encoder's input size, which is four times that of the masks; without the padding;
    to the image's size, height and width."""
    count = op.Shape(low_res_masks, start=0, end=2)
    side = op.Mul(op.Shape(low_res_masks, start=2), op.Constant(value_int=4))
    padded = op.Resize(
        low_res_masks,
        None,
        None,
        op.Concat(count, side, axis=0),
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    )
    size = op.Cast(orig_im_size, to=DOUBLE.dtype)
    scale = op.Div(op.Cast(side, to=DOUBLE.dtype), op.ReduceMax(size))
    half = op.Cast(op.Constant(value_float=0.5), to=DOUBLE.dtype)
    inside = op.Cast(op.Floor(op.Add(op.Mul(size, scale), half)), to=INT64.dtype)
    cut = op.Slice(padded, op.Constant(value_ints=[0, 0]), inside, op.Constant(value_ints=[2, 3]))
    masks = op.Resize(
        cut,
        None,
        None,
        op.Concat(count, op.Cast(orig_im_size, to=INT64.dtype), axis=0),
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    )
    return masks


@script()
def upscale_and_crop(
    low_res_masks: FLOAT[1, 1, "h", "w"], orig_im_size: FLOAT[2]
) -> tuple[UINT8[1, 1, "rows", "columns"], INT64[1], INT64[1], INT64[1], INT64[1]]:
    """The object alone, 0 and 1, and its first and last column and row: what CVAT reads.

    An empty mask is one pixel 0 in the corner.
    """
    logits = upscale(low_res_masks, orig_im_size)
    whole = op.Cast(op.Greater(logits, op.Constant(value_float=0.0)), to=UINT8.dtype)
    columns = op.ReduceMax(whole, op.Constant(value_ints=[0, 1, 2]), keepdims=0)
    rows = op.ReduceMax(whole, op.Constant(value_ints=[0, 1, 3]), keepdims=0)
    there = op.Cast(op.ReduceMax(rows), to=INT64.dtype)
    xtl, ytl = op.ArgMax(columns), op.ArgMax(rows)
    xbr = op.Mul(op.ArgMax(columns, select_last_index=1), there)
    ybr = op.Mul(op.ArgMax(rows, select_last_index=1), there)
    masks = op.Slice(
        whole,
        op.Concat(ytl, xtl, axis=0),
        op.Add(op.Concat(ybr, xbr, axis=0), op.Constant(value_ints=[1])),
        op.Constant(value_ints=[2, 3]),
    )
    return masks, xtl, ytl, xbr, ybr


def append_postprocessing(model: onnx.ModelProto, crop: bool = False) -> onnx.ModelProto:
    """Give a decoder of `low_res_masks` and `iou_predictions` the input `orig_im_size` and the output `masks`, with
    `crop` also `xtl`, `ytl`, `xbr`, `ybr`."""
    tail = inline_local_functions((upscale_and_crop if crop else upscale).to_model_proto()).graph
    joined = onnx.ModelProto()
    joined.CopyFrom(model)
    outer = {value.name for value in (*tail.input, *tail.output)}
    for node in tail.node:
        node.name = f"upscale_{node.name}"
        for names in (node.input, node.output):
            names[:] = [name if not name or name in outer else f"upscale_{name}" for name in names]
        joined.graph.node.append(node)
    joined.graph.input.append(next(value for value in tail.input if value.name == "orig_im_size"))
    low_res, ious = model.graph.output
    masks, *sides = tail.output
    del joined.graph.output[:]
    joined.graph.output.extend((masks, ious, low_res, *sides))
    onnx.checker.check_model(joined, full_check=True)
    return joined
