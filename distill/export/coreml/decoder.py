"""`Decoder.mlpackage` for Apple's devices, executed and compared before it is kept."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor

from distill.evaluate.ious import mask_iou
from distill.export.coreml.conversion import MAX_POINTS
from distill.export.coreml.origin import Origin
from distill.export.coreml.program import MilProgram
from distill.export.coreml.runtime import CoremlRuntime, Program, runtime_available
from distill.export.decoder import MASKS, VALUES
from distill.export.files import whole_directory
from distill.export.prompts import DECODER_IMAGES, difference, place_embedding, points_of, predicted, prompts_of
from distill.export.proof import Bounds, Reference, within

DECODER = Bounds(relative_error=1e-2, mask_miou=0.995, iou_difference=1e-2)


def export_coreml_decoder(model: Any, reference: Reference, path: Path, origin: Origin) -> dict[str, Any]:
    """Write a Core ML decoder: 1 to 16 points and a box → four low-resolution masks and their predicted IoUs.

    Args, returns, raises: as `export_coreml_encoder`, the model from `convert_decoder`.
    """
    sam = reference.decoder
    assert sam is not None
    origin.write_to(model, f"Segment Anything prompt encoder and mask decoder of {origin.teacher}")
    described = {"image_embeddings": "what Encoder.mlpackage makes", **VALUES}
    for name in ("image_embeddings", "point_coords", "point_labels"):
        model.input_description[name] = described[name]
    for name in ("low_res_masks", "iou_predictions"):
        model.output_description[name] = described[name]
    with whole_directory(path) as temporary:
        model.save(str(temporary))
        parity = within(path.name, decoder_parity(MilProgram(temporary), reference), DECODER)
        if runtime_available():
            parity["runtime"] = decoder_parity(CoremlRuntime(temporary), reference)
            within(path.name, parity["runtime"], DECODER)
    channels, cells = sam.prompt_encoder.embed_dim, sam.prompt_encoder.image_embedding_size[0]
    shapes: dict[str, tuple[list[Any], str]] = {
        "image_embeddings": ([1, channels, cells, cells], "float16"),
        "point_coords": ([1, f"1 to {MAX_POINTS}", 2], "float32"),
        "point_labels": ([1, f"1 to {MAX_POINTS}"], "float32"),
        "low_res_masks": ([1, MASKS, 4 * cells, 4 * cells], "float16"),
        "iou_predictions": ([1, MASKS], "float16"),
    }
    entries = {
        name: {"shape": shape, "dtype": dtype, "values": described[name]} for name, (shape, dtype) in shapes.items()
    }
    return {
        "format": "coreml",
        "precision": "float16, positions of points in float32",
        "minimum_deployment_target": "iOS 16, macOS 13",
        "inputs": {name: entries[name] for name in ("image_embeddings", "point_coords", "point_labels")},
        "outputs": {name: entries[name] for name in ("low_res_masks", "iou_predictions")},
        "parity": parity,
    }


def decoder_parity(decode: Program, reference: Reference) -> dict[str, Any]:
    """A decoder against `SamPredictor`: the largest relative error of low-resolution logits, and the mean IoU
    of the masks that these become at the image's size."""
    assert reference.decoder is not None
    predictor = SamPredictor(reference.decoder)
    errors, differences, ious = [], [], []
    pairs = list(zip(reference.rows, reference.embeddings, strict=True))[:DECODER_IMAGES]
    for row, embedding in pairs:
        place_embedding(predictor, embedding, row)
        for prompt in prompts_of(row):
            coords, labels = points_of(predictor, prompt)
            made = decode(
                {"image_embeddings": embedding.astype(np.float16), "point_coords": coords, "point_labels": labels}
            )
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
        "mask_miou": float(np.mean(ious)),
    }
