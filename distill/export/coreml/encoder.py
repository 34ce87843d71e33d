"""`Encoder.mlpackage` for Apple's devices, executed and compared before it is kept.

It takes an image, so that an app passes a pixel buffer.
"""

from pathlib import Path
from typing import Any

import numpy as np

from distill.export.coreml.origin import Origin
from distill.export.coreml.package import save_package
from distill.export.coreml.program import MilProgram
from distill.export.coreml.runtime import CoremlRuntime, Program, runtime_available
from distill.export.coreml.weights import FULL, Weights
from distill.export.files import whole_directory
from distill.export.proof import COMPRESSED, FLOAT16, Encode, Reference, within
from embeddings_cache.images import PIXEL_MEAN

PADDING_COLOUR = tuple(round(channel) for channel in PIXEL_MEAN)
"""The mean colour in 8 bits, which an `eight_bit` encoder takes for the mean itself."""


def export_coreml_encoder(
    model: Any, reference: Reference, path: Path, origin: Origin, weights: Weights = FULL
) -> dict[str, Any]:
    """Write a Core ML encoder; nothing is left at `path` unless it agrees with PyTorch.

    Args:
        model: from `convert_encoder` and `compress`.
        reference: what PyTorch makes of some images.
        path: of the package, a directory.
        origin: for its metadata.
        weights: how it keeps them.

    Returns:
        Inputs, outputs and parity, for the manifest.

    Raises:
        ParityError: the package does not reproduce the encoder.
    """
    size = reference.image_size
    origin.write_to(model, f"Segment Anything image encoder: {origin.describe()}")
    model.input_description["image"] = (
        f"RGB, longest side resized to {size}, at the top left; the rest filled with {PADDING_COLOUR}"
    )
    model.output_description["image_embeddings"] = "embedding for Segment Anything's prompt encoder and mask decoder"
    with whole_directory(path) as temporary:
        save_package(model, temporary)
        parity = reference.parity(coreml_encode(MilProgram(temporary), size))
        if weights.bits is None:
            exact = coreml_encode(MilProgram(temporary, float16=False), size)
            parity["relative_error_in_float32"] = reference.relative_error(exact)
        if runtime_available():
            parity["runtime"] = reference.parity(coreml_encode(CoremlRuntime(temporary), size))
            within(path.name, parity["runtime"], COMPRESSED if weights.bits else FLOAT16)
        parity = within(path.name, parity, COMPRESSED if weights.bits else FLOAT16)
    return {
        "format": "coreml",
        "precision": weights.precision,
        "minimum_deployment_target": weights.target,
        "inputs": {
            "image": {
                "shape": [1, 3, size, size],
                "dtype": "image, RGB",
                "range": [0, 255],
                "values": "RGB; longest side resized to S, padded right and bottom with padding_colour",
                "padding_colour": list(PADDING_COLOUR),
            }
        },
        "outputs": {"image_embeddings": {"shape": list(reference.embeddings[0].shape), "dtype": "float16"}},
        "parity": parity,
    }


def coreml_encode(program: Program, size: int) -> Encode:
    """A package that runs, as something that turns a resized picture into its embedding."""
    return lambda pixels: program({"image": pad_with_rounded_mean(pixels, size)})["image_embeddings"]


def pad_with_rounded_mean(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resized RGB uint8 (h, w, 3) → uint8 (1, 3, size, size), the pixel buffer that an app makes."""
    padded = np.empty((1, 3, size, size), dtype=np.uint8)
    padded[:] = np.array(PADDING_COLOUR, dtype=np.uint8)[:, None, None]
    padded[0, :, : pixels.shape[0], : pixels.shape[1]] = pixels.transpose(2, 0, 1)
    return padded
