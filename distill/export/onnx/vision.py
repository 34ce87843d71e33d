"""`vision_encoder.onnx`, as transformers cuts SAM for ONNX: an encoder that gives positions beside the embedding,
compared with PyTorch before it is kept."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from segment_anything.modeling import Sam

from distill.export.onnx.encoder import FLOAT32
from distill.export.onnx.file import open_session, opset_of
from distill.export.onnx.int8 import INT8
from distill.export.proof import FLOAT16, Encode, Reference, within
from embeddings_cache.images import PIXEL_MEAN, PIXEL_STD
from embeddings_cache.system import whole_file


def vision_model(encoder: onnx.ModelProto, sam: Sam) -> onnx.ModelProto:
    """`vision_encoder`: what transformers' image processor makes, `pixel_values` → `image_embeddings` and
    `image_positional_embeddings`, from an encoder of any precision whose normalisation lies inside.

    Normalised pixels are brought back to 0–255 first, which costs nothing, moves them by 10⁻⁶ and takes zeros to the
    mean colour exactly: so a file in 8 bits stays the one that was calibrated.
    """
    model = onnx.ModelProto()
    model.CopyFrom(encoder)
    (image,) = model.graph.input
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    places = sam.prompt_encoder.get_dense_pe().detach().numpy()
    constants = {"rgb_mean": mean, "rgb_std": std, "positions": places}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    batch = image.type.tensor_type.shape.dim[0]
    pixels = onnx.ValueInfoProto()
    pixels.CopyFrom(image)
    pixels.name = "pixel_values"
    head = [
        helper.make_node("Mul", ["pixel_values", "rgb_std"], ["rgb_from_mean"], name="to_rgb_scale"),
        helper.make_node("Add", ["rgb_from_mean", "rgb_mean"], [image.name], name="to_rgb_shift"),
    ]
    spread = helper.make_tensor("spread", TensorProto.INT64, [3], [1, 1, 1])
    tail = [
        helper.make_node("Shape", ["pixel_values"], ["images"], name="images", start=0, end=1),
        helper.make_node("Constant", [], ["spread"], name="spread", value=spread),
        helper.make_node("Concat", ["images", "spread"], ["copies"], name="copies", axis=0),
        helper.make_node("Expand", ["positions", "copies"], ["image_positional_embeddings"], name="each_image"),
    ]
    nodes = [*head, *model.graph.node, *tail]
    positions = helper.make_tensor_value_info(
        "image_positional_embeddings", TensorProto.FLOAT, [batch.dim_param or batch.dim_value, *places.shape[1:]]
    )
    del model.graph.node[:], model.graph.input[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model.graph.input.append(pixels)
    model.graph.output.append(positions)
    return model


def export_vision_encoder(
    model: onnx.ModelProto, reference: Reference, path: Path, precision: str = "float32"
) -> dict[str, Any]:
    """Write a `vision_model`.

    Raises:
        ParityError: the file does not reproduce the encoder.
    """
    bounds = {"float32": FLOAT32, "float16": FLOAT16, "int8": INT8}[precision]
    with whole_file(path) as temporary:
        onnx.save(model, temporary)
        session = open_session(temporary)
        parity = within(path.name, reference.parity(normalized_encode(session)), bounds)
    (pixels,) = session.get_inputs()
    values = "RGB as SamImageProcessor makes it: (x − mean) / std, padded right and bottom with zeros"
    return {
        "format": "onnx",
        "opset": opset_of(model),
        "precision": precision,
        "inputs": {pixels.name: {"shape": pixels.shape, "dtype": "float32", "values": values}},
        "outputs": {each.name: {"shape": each.shape, "dtype": "float32"} for each in session.get_outputs()},
        "parity": parity,
    }


def normalized_encode(session: onnxruntime.InferenceSession) -> Encode:
    """A `vision_encoder` as something that turns a resized picture into its embedding."""
    size = session.get_inputs()[0].shape[-1]

    def encode(pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape[:2]
        values = np.zeros((1, 3, size, size), np.float32)
        normalized = (pixels - np.array(PIXEL_MEAN, np.float32)) / np.array(PIXEL_STD, np.float32)
        values[0, :, :height, :width] = normalized.transpose(2, 0, 1)
        return session.run(["image_embeddings"], {"pixel_values": values})[0]

    return encode
