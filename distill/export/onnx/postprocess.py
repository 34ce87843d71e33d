"""What an ONNX decoder does around SAM's own: completes prompts that lack their end, brings masks to the image's size.

Written in operators rather than exported: whether a token is added depends on values; `Resize` has to place pixels as
PyTorch does (half_pixel, also where a side is one pixel long); and the padding has to be cut off where
`ResizeLongestSide` put it, which computes in float64.
"""

# The functions below are ONNX Script, another language that reads like Python: text in a type names a dimension.
# ruff: noqa: F821
# mypy: ignore-errors

import onnx
from onnx.inliner import inline_local_functions
from onnxscript import DOUBLE, FLOAT, INT64, UINT8, script
from onnxscript import opset18 as op

COMPLETED = ("completed_coords", "completed_labels")


@script()
def complete_prompt(
    point_coords: FLOAT[1, "num_points", 2], point_labels: FLOAT[1, "num_points"]
) -> tuple[FLOAT[1, "tokens", 2], FLOAT[1, "tokens"]]:
    """A prompt as SAM's prompt encoder makes it: where there is no corner of a box (2) it ends in (0, 0), labelled −1,
    also if a client has left that out; beside a box there is none, also if a client has added it."""
    padding = op.Equal(point_labels, op.Constant(value_float=-1.0))
    corners = op.Equal(point_labels, op.Constant(value_float=2.0))
    zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    nothing = op.Reshape(zero, op.Constant(value_ints=[1, 1]))  # ONNX Runtime 1.14 cannot sum over an empty list
    boxes = op.ReduceSum(op.Concat(op.Cast(corners, to=INT64.dtype), nothing, axis=1), one, keepdims=0)
    ends = op.ReduceSum(op.Concat(op.Cast(padding, to=INT64.dtype), nothing, axis=1), one, keepdims=0)
    lacking = op.Cast(op.Less(op.Add(boxes, ends), one), to=INT64.dtype)
    kept = op.Reshape(op.Or(op.Not(padding), op.Less(boxes, one)), op.Constant(value_ints=[-1]))
    end = op.Reshape(op.Constant(value_floats=[0.0, 0.0]), op.Constant(value_ints=[1, 1, 2]))
    label = op.Reshape(op.Constant(value_floats=[-1.0]), op.Constant(value_ints=[1, 1]))
    coords, labels = op.Compress(point_coords, kept, axis=1), op.Compress(point_labels, kept, axis=1)
    completed_coords = op.Concat(coords, op.Slice(end, zero, lacking, one), axis=1)
    completed_labels = op.Concat(labels, op.Slice(label, zero, lacking, one), axis=1)
    return completed_coords, completed_labels


@script()
def inside_in_integers(side: INT64[2], orig_im_size: FLOAT[2]) -> INT64[2]:
    """Rows and columns of a picture that is resized to a longest side of S: of n pixels beside L, ⌊n·S/L + ½⌋."""
    size, two = op.Cast(orig_im_size, to=INT64.dtype), op.Constant(value_int=2)
    longest = op.ReduceMax(size, op.Constant(value_ints=[0]))
    return op.Div(op.Add(op.Mul(op.Mul(size, side), two), longest), op.Mul(longest, two))


@script()
def inside_in_float64(side: INT64[2], orig_im_size: FLOAT[2]) -> INT64[2]:
    """The same in `ResizeLongestSide`'s arithmetic, which rounds some halves down where S is no power of two."""
    size = op.Cast(orig_im_size, to=DOUBLE.dtype)
    scale = op.Div(op.Cast(side, to=DOUBLE.dtype), op.ReduceMax(size, op.Constant(value_ints=[0])))
    half = op.Cast(op.Constant(value_float=0.5), to=DOUBLE.dtype)
    return op.Cast(op.Floor(op.Add(op.Mul(size, scale), half)), to=INT64.dtype)


@script()
def four_times(low_res_masks: FLOAT[1, "M", "h", "w"]) -> FLOAT[1, "M", "S", "S"]:
    """Masks of the encoder's input size, padding and all."""
    sides = op.Mul(op.Shape(low_res_masks), op.Constant(value_ints=[1, 1, 4, 4]))
    return op.Resize(low_res_masks, None, None, sides, mode="linear", coordinate_transformation_mode="half_pixel")


@script()
def unpad_in_integers(low_res_masks: FLOAT[1, "M", "h", "w"], orig_im_size: FLOAT[2]) -> FLOAT[1, "M", "H", "W"]:
    """Masks of the encoder's input size, without the padding."""
    padded = four_times(low_res_masks)
    inside = inside_in_integers(op.Shape(padded, start=2), orig_im_size)
    return op.Slice(padded, op.Constant(value_ints=[0, 0]), inside, op.Constant(value_ints=[2, 3]))


@script()
def unpad_in_float64(low_res_masks: FLOAT[1, "M", "h", "w"], orig_im_size: FLOAT[2]) -> FLOAT[1, "M", "H", "W"]:
    """Masks of the encoder's input size, without the padding."""
    padded = four_times(low_res_masks)
    inside = inside_in_float64(op.Shape(padded, start=2), orig_im_size)
    return op.Slice(padded, op.Constant(value_ints=[0, 0]), inside, op.Constant(value_ints=[2, 3]))


@script()
def enlarge(unpadded: FLOAT[1, "M", "h", "w"], orig_im_size: FLOAT[2]) -> FLOAT[1, "M", "H", "W"]:
    """To the image's size, height and width, as `Sam.postprocess_masks` does."""
    masks = op.Resize(
        unpadded,
        None,
        None,
        op.Concat(op.Shape(unpadded, start=0, end=2), op.Cast(orig_im_size, to=INT64.dtype), axis=0),
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    )
    return masks


@script()
def enlarge_object(
    unpadded: FLOAT[1, 1, "h", "w"], orig_im_size: FLOAT[2]
) -> tuple[UINT8[1, 1, "rows", "columns"], INT64[1], INT64[1], INT64[1], INT64[1]]:
    """The object alone, 0 and 1, and its first and last column and row: what CVAT reads.

    Only what may be on the object is enlarged. An empty mask is one pixel 0 in the corner.
    """
    one, half = op.Constant(value_floats=[1.0]), op.Constant(value_floats=[0.5])
    low = op.Cast(op.Greater(unpadded, op.Constant(value_float=0.0)), to=UINT8.dtype)
    low_rows = op.ReduceMax(low, op.Constant(value_ints=[0, 1, 3]), keepdims=0)
    low_columns = op.ReduceMax(low, op.Constant(value_ints=[0, 1, 2]), keepdims=0)
    some = op.Cast(op.ReduceMax(low_rows, op.Constant(value_ints=[0])), to=INT64.dtype)
    first = op.Concat(op.ArgMax(low_rows), op.ArgMax(low_columns), axis=0)
    last = op.Concat(op.ArgMax(low_rows, select_last_index=1), op.ArgMax(low_columns, select_last_index=1), axis=0)
    # A pixel X of the image lies at (X + ½)·(low ÷ image) − ½, between two of the unpadded mask's.
    ratio = op.Div(orig_im_size, op.Cast(op.Shape(unpadded, start=2), to=FLOAT.dtype))
    before = op.Floor(op.Sub(op.Mul(op.Sub(op.Cast(first, to=FLOAT.dtype), half), ratio), half))
    after = op.Ceil(op.Sub(op.Mul(op.Add(op.Cast(op.Mul(last, some), to=FLOAT.dtype), op.Add(one, half)), ratio), half))
    begin = op.Max(before, op.Constant(value_floats=[0.0]))
    end = op.Min(after, op.Sub(orig_im_size, one))
    # `Resize` crops by shares of what lies between the first and the last pixel; one more is put around, for it clamps
    # there no longer. ONNX Runtime (1.15 to 1.32) copies an axis that keeps its length, whatever is to be cropped, so
    # such an axis gets one more.
    sides = op.Cast(op.Add(op.Sub(end, begin), one), to=INT64.dtype)
    kept = op.Equal(sides, op.Add(op.Shape(unpadded, start=2), op.Constant(value_ints=[2, 2])))
    behind = op.Add(op.Cast(kept, to=INT64.dtype), op.Constant(value_ints=[1, 1]))
    around = op.Pad(unpadded, op.Concat(op.Constant(value_ints=[0, 0, 1, 1, 0, 0]), behind, axis=0), mode="edge")
    spaces = op.Cast(op.Sub(op.Shape(around, start=2), op.Constant(value_int=1)), to=FLOAT.dtype)
    from_share = op.Div(op.Add(op.Div(op.Add(begin, half), ratio), half), spaces)
    to_share = op.Div(op.Add(op.Div(op.Add(end, half), ratio), half), spaces)
    both = op.Constant(value_floats=[0.0, 0.0])
    region = op.Resize(
        around,
        op.Concat(both, from_share, op.Add(both, one), to_share, axis=0),
        None,
        op.Concat(op.Constant(value_ints=[1, 1]), sides, axis=0),
        mode="linear",
        coordinate_transformation_mode="tf_crop_and_resize",
    )
    whole = op.Cast(op.Greater(region, op.Constant(value_float=0.0)), to=UINT8.dtype)
    rows = op.ReduceMax(whole, op.Constant(value_ints=[0, 1, 3]), keepdims=0)
    columns = op.ReduceMax(whole, op.Constant(value_ints=[0, 1, 2]), keepdims=0)
    there = op.Cast(op.ReduceMax(rows, op.Constant(value_ints=[0])), to=INT64.dtype)
    top, left = op.ArgMax(rows), op.ArgMax(columns)
    bottom = op.Mul(op.ArgMax(rows, select_last_index=1), there)
    right = op.Mul(op.ArgMax(columns, select_last_index=1), there)
    masks = op.Slice(
        whole,
        op.Concat(top, left, axis=0),
        op.Add(op.Concat(bottom, right, axis=0), op.Constant(value_ints=[1])),
        op.Constant(value_ints=[2, 3]),
    )
    above, beside = op.Split(op.Cast(begin, to=INT64.dtype), num_outputs=2)
    xtl, ytl = op.Mul(op.Add(left, beside), there), op.Mul(op.Add(top, above), there)
    xbr, ybr = op.Mul(op.Add(right, beside), there), op.Mul(op.Add(bottom, above), there)
    return masks, xtl, ytl, xbr, ybr


def complete_prompts(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let a decoder of points take prompts that lack their end, or have it beside a box."""
    head = inlined(complete_prompt)
    joined = onnx.ModelProto()
    joined.CopyFrom(model)
    renamed = dict(zip(("point_coords", "point_labels"), COMPLETED, strict=True))
    for node in joined.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    for value in joined.graph.value_info:  # runtimes reuse memory by these: inside there may be more or fewer
        for dimension in value.type.tensor_type.shape.dim:
            if "num_points" in dimension.dim_param:
                dimension.dim_param = dimension.dim_param.replace("num_points", "tokens")
    nodes = [*_prefixed(head, "complete", {*renamed, *COMPLETED}), *joined.graph.node]
    del joined.graph.node[:]
    joined.graph.node.extend(nodes)
    return joined


def append_postprocessing(model: onnx.ModelProto, crop: bool = False) -> onnx.ModelProto:
    """Give a decoder of `low_res_masks` and `iou_predictions` the input `orig_im_size` and the output `masks`, with
    `crop` also `xtl`, `ytl`, `xbr`, `ybr`."""
    low_res, ious = model.graph.output
    side = 4 * low_res.type.tensor_type.shape.dim[-1].dim_value
    cut = inlined(unpad_in_integers if side & (side - 1) == 0 else unpad_in_float64)
    tail = inlined(enlarge_object if crop else enlarge)
    joined = onnx.ModelProto()
    joined.CopyFrom(model)
    (made,) = cut.output
    made.name, inner = "unpadded", made.name
    for node in cut.node:
        node.output[:] = [made.name if name == inner else name for name in node.output]
    joined.graph.node.extend(_prefixed(cut, "unpad", {"low_res_masks", "orig_im_size", "unpadded"}))
    outer = {value.name for value in (*tail.input, *tail.output)}
    joined.graph.node.extend(_prefixed(tail, "enlarge", outer))
    joined.graph.input.append(next(value for value in tail.input if value.name == "orig_im_size"))
    masks, *sides = tail.output
    del joined.graph.output[:]
    joined.graph.output.extend((masks, ious, low_res, *sides))
    return joined


def inlined(function: object) -> onnx.GraphProto:
    """An ONNX Script function as a graph."""
    return inline_local_functions(function.to_model_proto()).graph


def _prefixed(graph: onnx.GraphProto, prefix: str, kept: set[str]) -> list[onnx.NodeProto]:
    """A graph's nodes, under names that are no others'; `kept` stay."""
    for node in graph.node:
        node.name = f"{prefix}_{node.name}"
        for names in (node.input, node.output):
            names[:] = [name if not name or name in kept else f"{prefix}_{name}" for name in names]
    return list(graph.node)
