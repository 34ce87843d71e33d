"""`Decoder.mlpackage` for Apple's devices, executed and compared before it is kept."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor

from distill.evaluate.ious import mask_iou
from distill.export.coreml.conversion import MAX_POINTS
from distill.export.coreml.origin import Origin
from distill.export.coreml.package import save_package
from distill.export.coreml.program import MilProgram
from distill.export.coreml.runtime import CoremlRuntime, Program, runtime_available
from distill.export.coreml.weights import FULL, Weights
from distill.export.decoder import MASKS, PAD, VALUES
from distill.export.files import whole_directory
from distill.export.prompts import (
    DECODER_IMAGES,
    GATE_IMAGES,
    difference,
    place_embedding,
    points_of,
    predicted,
    prompts_of,
)
from distill.export.proof import COMPRESSED, Bounds, Reference, spread, within

DECODER = Bounds(relative_error=1e-2, mask_miou=0.995, iou_difference=1e-2)

MEANINGS = {
    "image_embeddings": "what the encoder makes",
    **VALUES,
    "point_labels": "1 on the object, 0 off it, 2, 3 a box's corners, -1 where there is no point",
    "mask_input": "one of low_res_masks of an earlier answer, which this one corrects; or zeros",
    "has_mask_input": "1 to heed mask_input, else 0",
}
"""What inputs and outputs are, for manifest and package."""


def export_coreml_decoder(
    model: Any, reference: Reference, path: Path, origin: Origin, weights: Weights = FULL
) -> dict[str, Any]:
    """Write a Core ML decoder: 1 to 16 points and a box → four low-resolution masks and their predicted IoUs.

    Args, returns, raises: as `export_coreml_encoder`, the model from `convert_decoder`.
    """
    sam = reference.decoder
    assert sam is not None
    channels, cells = sam.prompt_encoder.embed_dim, sam.prompt_encoder.image_embedding_size[0]
    inputs: dict[str, tuple[list[int], str]] = {
        "image_embeddings": ([1, channels, cells, cells], "float16"),
        "point_coords": ([1, MAX_POINTS, 2], "float32"),
        "point_labels": ([1, MAX_POINTS], "float32"),
        "mask_input": ([1, 1, 4 * cells, 4 * cells], "float16"),
        "has_mask_input": ([1], "float16"),
    }
    outputs: dict[str, tuple[list[int], str]] = {
        "low_res_masks": ([1, MASKS, 4 * cells, 4 * cells], "float16"),
        "iou_predictions": ([1, MASKS], "float16"),
    }
    origin.write_to(model, f"Segment Anything prompt encoder and mask decoder of {origin.teacher}")
    for name in inputs:
        model.input_description[name] = MEANINGS[name]
    for name in outputs:
        model.output_description[name] = MEANINGS[name]
    bounds = COMPRESSED if weights.bits else DECODER
    with whole_directory(path) as temporary:
        save_package(model, temporary)
        images = GATE_IMAGES if weights.bits else DECODER_IMAGES
        parity = within(path.name, decoder_parity(MilProgram(temporary), reference, images), bounds)
        if runtime_available():
            parity["runtime"] = decoder_parity(CoremlRuntime(temporary), reference, images)
            within(path.name, parity["runtime"], bounds)
    return {
        "format": "coreml",
        "precision": f"{weights.precision}, positions of points in float32",
        "minimum_deployment_target": weights.target,
        "inputs": _described(inputs),
        "outputs": _described(outputs),
        "parity": parity,
    }


def _described(entries: dict[str, tuple[list[int], str]]) -> dict[str, Any]:
    return {
        name: {"shape": shape, "dtype": dtype, "values": MEANINGS[name]} for name, (shape, dtype) in entries.items()
    }


def decoder_feeds(
    embedding: np.ndarray, points: np.ndarray, labels: np.ndarray, earlier: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """A prompt as a package takes it, filled up with points that are not there.

    Args:
        embedding: (1, C, h, w).
        points: (1, N, 2), x and y in pixels of the resized image, corners of a box among them.
        labels: (1, N).
        earlier: (1, 4h, 4w), one of an earlier answer's low-resolution masks.
    """
    coords, kinds = np.zeros((1, MAX_POINTS, 2), np.float32), np.full((1, MAX_POINTS), PAD, np.float32)
    given = labels[0] != PAD
    coords[0, : given.sum()], kinds[0, : given.sum()] = points[0, given], labels[0, given]
    side = 4 * embedding.shape[-1]
    return {
        "image_embeddings": embedding.astype(np.float16),
        "point_coords": coords,
        "point_labels": kinds,
        "mask_input": np.zeros((1, 1, side, side), np.float16) if earlier is None else earlier[None].astype(np.float16),
        "has_mask_input": np.array([earlier is not None], np.float16),
    }


def decoder_parity(decode: Program, reference: Reference, images: int = DECODER_IMAGES) -> dict[str, Any]:
    """A decoder against `SamPredictor` on the first so many images: the largest relative error of low-resolution
    logits, and the IoUs of the masks that these become at the image's size. On the first image each prompt is also
    given once more, with the mask of its first answer."""
    assert reference.decoder is not None
    predictor = SamPredictor(reference.decoder)
    errors, differences = [], []
    ious: list[float] = []
    pairs = list(zip(reference.rows, reference.embeddings, strict=True))[:images]
    for number, (row, embedding) in enumerate(pairs):
        place_embedding(predictor, embedding, row)
        prompts = list(prompts_of(row))
        if not number:
            prompts += [{**each, "mask_input": predicted(predictor, each, False)[2][0, :1]} for each in prompts]
        for prompt in prompts:
            made = decode(decoder_feeds(embedding, *points_of(predictor, prompt), prompt.get("mask_input")))
            logits, predicted_ious, low_res = predicted(predictor, prompt, single=False)
            differences.append(difference(made["iou_predictions"], predicted_ious, "predicted IoUs"))
            apart = made["low_res_masks"] - low_res
            errors.append(np.linalg.norm(apart) / np.linalg.norm(low_res))
            low = torch.from_numpy(made["low_res_masks"])
            upscaled = reference.decoder.postprocess_masks(low, row.input_size, row.original_size)
            masks = zip(upscaled[0].numpy() > 0, logits[0] > 0, strict=True)
            ious += [mask_iou(*pair) for pair in masks]
    return {
        "images": len(pairs),
        "images_from": reference.images_from,
        "relative_error": float(np.max(errors)),
        "iou_difference": float(np.max(differences)),
        "masks": len(ious),
        **spread(ious),
    }
