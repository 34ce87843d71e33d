"""`encoder.onnx` and `encoder_fp16.onnx`, compared with PyTorch through ONNX Runtime before they are kept."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from PIL import Image

from distill.export.encoder import RgbEncoder, pad_with_mean_colour
from distill.export.onnx.file import TWO_GIGABYTES, onnx_model, open_session, opset_of
from distill.export.onnx.float16 import in_float16
from distill.export.proof import FLOAT16, Bounds, Encode, ParityError, Reference, within
from distill.schema import OLDEST_OPSET
from embeddings_cache.images import PIXEL_MEAN, resize_longest_side
from embeddings_cache.system import whole_file
from students import InputError

FLOAT32 = Bounds(max_difference=1e-3, mask_miou=0.995)
"""Embeddings leave a LayerNorm, so their values are of order 1."""


def export_onnx_encoder(
    model: onnx.ModelProto, reference: Reference, path: Path, float16: bool = False
) -> dict[str, Any]:
    """Write an ONNX encoder; nothing is left at `path` unless it agrees with PyTorch on every image.

    Args:
        model: from `encoder_model`.
        reference: what PyTorch makes of some images.
        path: of the file.
        float16: half of the bytes; input and output stay float32.

    Returns:
        Inputs, outputs and parity, for the manifest.

    Raises:
        ParityError: the file does not reproduce the encoder.
    """
    if float16:
        model = in_float16(model)
    with whole_file(path) as temporary:
        onnx.save(model, temporary)
        parity = within(path.name, reference.parity(onnx_encode(temporary)), FLOAT16 if float16 else FLOAT32)
        refuse_mixed_batches(path.name, temporary, reference)
        return {**describe_encoder(temporary), "precision": "float16" if float16 else "float32", "parity": parity}


def encoder_model(encoder: RgbEncoder, dynamic_batch: bool = False, opset: int = OLDEST_OPSET) -> onnx.ModelProto:
    """An encoder in float32 with input `image` and output `image_embeddings`; `dynamic_batch`: of any number of images.

    Raises:
        InputError: it would not fit into one file.
    """
    if sum(parameter.numel() for parameter in encoder.parameters()) * 4 > TWO_GIGABYTES:
        raise InputError("the encoder has more weights than one ONNX file holds (2 GB)")
    # A batch of one is what torch.export would make a constant.
    example = torch.zeros(2 if dynamic_batch else 1, 3, encoder.image_size, encoder.image_size)
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("N")},)} if dynamic_batch else {}
    return onnx_model(encoder, (example,), opset, input_names=["image"], output_names=["image_embeddings"], **shapes)


def onnx_encode(path: Path) -> Encode:
    """An ONNX encoder as something that turns a resized picture into its embedding."""
    session = open_session(path)
    size = session.get_inputs()[0].shape[-1]

    def encode(pixels: np.ndarray) -> np.ndarray:
        (embedding,) = session.run(["image_embeddings"], {"image": pad_with_mean_colour(pixels, size)})
        return embedding

    return encode


def refuse_mixed_batches(name: str, path: Path, reference: Reference) -> None:
    """Raise `ParityError` where a file that takes batches makes something else of images together than of each."""
    session = open_session(path)
    if isinstance(session.get_inputs()[0].shape[0], int):
        return
    image = pad_with_mean_colour(reference.pictures[0], reference.image_size)
    images = np.concatenate([image, image[..., ::-1]])
    together = session.run(None, {"image": images})[0]
    singly = np.concatenate([session.run(None, {"image": each[None]})[0] for each in images])
    if not np.linalg.norm(together - singly) <= 1e-2 * np.linalg.norm(singly):
        raise ParityError(f"{name} makes something else of two images together than of each")


def picture_encoder_model(model: onnx.ModelProto, uint8: bool) -> onnx.ModelProto:
    """An encoder of pictures (H, W, 3) as they are, from an `encoder_model`: `uint8`, or whole numbers in float32."""
    from distill.export.onnx.preprocess import prepend_preprocessing  # onnxscript takes half a second to load

    size = model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value
    return prepend_preprocessing(model, size, uint8)


def export_picture_encoder(model: onnx.ModelProto, reference: Reference, path: Path) -> dict[str, Any]:
    """Write an ONNX encoder that takes pictures of any size, from `picture_encoder_model`.

    Raises:
        ParityError: the file does not reproduce the encoder, or resizes otherwise than Pillow.
    """
    with whole_file(path) as temporary:
        onnx.save(model, temporary)
        session = open_session(temporary)
        (picture,) = session.get_inputs()
        dtype = np.uint8 if picture.type == "tensor(uint8)" else np.float32

        def encode(pixels: np.ndarray) -> np.ndarray:
            (embedding,) = session.run(["image_embeddings"], {picture.name: pixels.astype(dtype)})
            return embedding

        parity = within(path.name, reference.parity(encode), FLOAT32)
        larger = np.asarray(Image.fromarray(reference.pictures[0]).resize((1500, 1000), Image.Resampling.BICUBIC))
        smaller = resize_longest_side(larger, reference.image_size)
        if not np.abs(encode(larger) - encode(smaller)).max() <= FLOAT32.max_difference:
            raise ParityError(f"{path.name} resizes a picture of 1500×1000 px otherwise than Pillow")
        values = "RGB, 0–255, of any height and width: it is resized and padded inside"
        taken = {"shape": ["height", "width", 3], "dtype": str(np.dtype(dtype)), "values": values}
        return {
            "format": "onnx",
            "opset": opset_of(model),
            "precision": "float32",
            "inputs": {picture.name: taken},
            "outputs": {"image_embeddings": {"shape": session.get_outputs()[0].shape, "dtype": "float32"}},
            "parity": parity,
        }


def describe_encoder(path: Path) -> dict[str, Any]:
    """Inputs and outputs of an ONNX encoder, read off the file."""
    session: onnxruntime.InferenceSession = open_session(path)
    return {
        "format": "onnx",
        "opset": opset_of(onnx.load(path, load_external_data=False)),
        "inputs": {
            "image": {
                "shape": session.get_inputs()[0].shape,
                "dtype": "float32",
                "range": [0, 255],
                "values": "RGB; longest side resized to S, padded right and bottom with padding_colour",
                "padding_colour": list(PIXEL_MEAN),
            }
        },
        "outputs": {"image_embeddings": {"shape": session.get_outputs()[0].shape, "dtype": "float32"}},
    }
