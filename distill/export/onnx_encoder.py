"""`encoder.onnx`, compared with PyTorch through ONNX Runtime before it is kept."""

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from distill.export.encoder import RgbEncoder, pad_with_mean_colour, reference_embedding
from embeddings_cache.files import whole_file
from embeddings_cache.preprocess import PIXEL_MEAN
from students import InputError, StudentEncoder

OPSET = 18
MAX_DIFFERENCE = 1e-3
"""Largest absolute difference allowed; embeddings leave a LayerNorm, so their values are of order 1."""


def export_onnx_encoder(student: StudentEncoder, path: Path, pictures: list[np.ndarray]) -> dict[str, Any]:
    """Write an ONNX encoder; nothing is left at `path` unless it agrees with the student on every picture.

    Args:
        student: on the CPU, in eval mode.
        path: of the file.
        pictures: resized pictures, RGB uint8 (h, w, 3).

    Returns:
        Inputs, outputs and parity, for the manifest.

    Raises:
        InputError: the file does not reproduce the student.
    """
    size = student.img_size
    with whole_file(path) as temporary:
        _write(RgbEncoder(student).eval(), temporary, size)
        difference = max_difference(student, temporary, pictures)
        if not difference <= MAX_DIFFERENCE:
            raise InputError(f"{path.name} differs from PyTorch by {difference:.2g} (allowed: {MAX_DIFFERENCE:g})")
    cells = size // 16
    return {
        "format": "onnx",
        "opset": OPSET,
        "precision": "float32",
        "inputs": {
            "image": {
                "shape": [1, 3, size, size],
                "dtype": "float32",
                "values": "RGB, 0-255; longest side resized to S, padded right and bottom with padding_colour",
                "padding_colour": list(PIXEL_MEAN),
            }
        },
        "outputs": {
            "image_embeddings": {"shape": [1, student.config.embed_dim, cells, cells], "dtype": "float32"},
        },
        "parity": {"max_difference": difference, "allowed": MAX_DIFFERENCE, "pictures": len(pictures)},
    }


def max_difference(student: StudentEncoder, path: Path, pictures: list[np.ndarray]) -> float:
    """Largest |ONNX Runtime − PyTorch| over some pictures, each side prepared in its own way; NaN counts."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    differences = []
    for picture in pictures:
        image = pad_with_mean_colour(picture, student.img_size).numpy()
        (embedding,) = session.run(["image_embeddings"], {"image": image})
        differences.append(np.abs(embedding - reference_embedding(student, picture)).max())
    return float(np.max(differences))


def _write(encoder: RgbEncoder, path: Path, size: int) -> None:
    example = torch.zeros(1, 3, size, size)
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                encoder,
                (example,),
                str(path),
                dynamo=True,
                verbose=False,
                input_names=["image"],
                output_names=["image_embeddings"],
                opset_version=OPSET,
                external_data=False,
            )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
