"""`decoder_batch.onnx`: many prompts on one image in a pass, compared with `SamPredictor` before it is kept."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from distill.evaluate.ious import mask_iou
from distill.export.batch import BatchDecoder
from distill.export.decoder import PAD, VALUES
from distill.export.onnx.decoder import BOUNDS
from distill.export.onnx.file import onnx_model, open_session, opset_of
from distill.export.prompts import (
    DECODER_IMAGES,
    Prompt,
    difference,
    figures,
    place_embedding,
    points_of,
    predicted,
    prompts_of,
)
from distill.export.proof import Bounds, Reference, within
from distill.schema import OLDEST_OPSET
from embeddings_cache.system import whole_file

LABELS = "1 on the object, 0 off it, 2, 3 a box's corners, -1 where there is no point"

FEEDS = ("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input")


def batch_decoder_model(sam: Sam, opset: int = OLDEST_OPSET) -> onnx.ModelProto:
    """A `BatchDecoder` of any number of prompts and points."""
    cells = sam.prompt_encoder.image_embedding_size[0]
    example = (
        torch.zeros(1, sam.prompt_encoder.embed_dim, cells, cells),
        torch.zeros(2, 3, 2),
        torch.ones(2, 3),
        torch.zeros(2, 1, 4 * cells, 4 * cells),
        torch.zeros(2),
    )
    prompts, points = torch.export.Dim("num_prompts"), torch.export.Dim("num_points")
    return onnx_model(
        BatchDecoder(sam).eval(),
        example,
        opset,
        input_names=list(FEEDS),
        output_names=["low_res_masks", "iou_predictions"],
        dynamic_shapes=({}, {0: prompts, 1: points}, {0: prompts, 1: points}, {0: prompts}, {0: prompts}),
    )


def export_batch_decoder(
    model: onnx.ModelProto, reference: Reference, path: Path, bounds: Bounds = BOUNDS, precision: str = "float32"
) -> dict[str, Any]:
    """Write an ONNX decoder of many prompts.

    Args:
        model: from `batch_decoder_model`, or made of one.
        reference: whose decoder it is, and images with embeddings to compare on.
        path: of the file.
        bounds: what it may differ by.
        precision: what it computes in, for the manifest.

    Raises:
        ParityError: the file does not do what `SamPredictor` does.
    """
    with whole_file(path) as temporary:
        onnx.save(model, temporary)
        session = open_session(temporary)
        parity = within(path.name, batch_parity(session, reference), bounds)
    channels, cells = session.get_inputs()[0].shape[1:3]
    side = 4 * cells
    return {
        "format": "onnx",
        "opset": opset_of(model),
        "precision": precision,
        "inputs": {
            "image_embeddings": {"shape": [1, channels, cells, cells], "dtype": "float32"},
            "point_coords": {"shape": ["P", "num_points", 2], "dtype": "float32", "values": VALUES["point_coords"]},
            "point_labels": {"shape": ["P", "num_points"], "dtype": "float32", "values": LABELS},
            "mask_input": {
                "shape": ["P", 1, side, side],
                "dtype": "float32",
                "values": "one of low_res_masks of each prompt's earlier answer, or zeros",
            },
            "has_mask_input": {"shape": ["P"], "dtype": "float32", "values": "above 0 to heed mask_input"},
        },
        "outputs": {
            "low_res_masks": {"shape": ["P", 4, side, side], "dtype": "float32", "values": VALUES["low_res_masks"]},
            "iou_predictions": {"shape": ["P", 4], "dtype": "float32", "values": VALUES["iou_predictions"]},
        },
        "masks": "4: the one for clear prompts, then three for ambiguous ones",
        "parity": parity,
    }


def batch_parity(session: onnxruntime.InferenceSession, reference: Reference) -> dict[str, Any]:
    """A decoder of many prompts against `SamPredictor`, prompt by prompt: all of an image's in one pass, those of fewer
    points filled up, and every other one once more with the mask of its first answer."""
    predictor = SamPredictor(reference.decoder)
    logits, predicted_ious = [], []
    ious: list[float] = []
    pairs = list(zip(reference.rows, reference.embeddings, strict=True))[:DECODER_IMAGES]
    for row, embedding in pairs:
        place_embedding(predictor, embedding, row)
        prompts = list(prompts_of(row))
        prompts += [{**each, "mask_input": predicted(predictor, each, False)[2][0, :1]} for each in prompts[::2]]
        low_res, iou = session.run(["low_res_masks", "iou_predictions"], batch_feeds(predictor, prompts))
        for place, prompt in enumerate(prompts):
            _, expected_iou, expected = predicted(predictor, prompt, False)
            logits.append(difference(low_res[place : place + 1], expected, "low-resolution masks"))
            predicted_ious.append(difference(iou[place : place + 1], expected_iou, "predicted IoUs"))
            ious += map(mask_iou, low_res[place] > 0, expected[0] > 0)
    return figures(len(pairs), reference.images_from, logits, predicted_ious, ious)


def batch_feeds(predictor: SamPredictor, prompts: list[Prompt]) -> dict[str, np.ndarray]:
    """Prompts as the file takes them, filled up with points that are not there."""
    asked = [points_of(predictor, prompt) for prompt in prompts]
    longest = max(labels.shape[1] for _, labels in asked)
    coords = np.zeros((len(asked), longest, 2), np.float32)
    kinds = np.full((len(asked), longest), PAD, np.float32)
    side = 4 * predictor.features.shape[-1]
    masks, given = np.zeros((len(asked), 1, side, side), np.float32), np.zeros(len(asked), np.float32)
    for place, (prompt, (points, labels)) in enumerate(zip(prompts, asked, strict=True)):
        coords[place, : points.shape[1]], kinds[place, : labels.shape[1]] = points[0], labels[0]
        if "mask_input" in prompt:
            masks[place], given[place] = prompt["mask_input"], 1
    return dict(zip(FEEDS, (predictor.features.numpy(), coords, kinds, masks, given), strict=True))
