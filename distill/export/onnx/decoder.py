"""`decoder.onnx` and its kin: segment-anything's decoder for ONNX, compared with `SamPredictor` before it is kept."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from distill.evaluate.ious import mask_iou
from distill.export.decoder import VALUES, PromptDecoder
from distill.export.onnx.file import onnx_model, open_session, opset_of
from distill.export.onnx.opset import in_opset
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
from distill.export.proof import Bounds, ParityError, Reference, within
from distill.schema import OLDEST_OPSET
from embeddings_cache.system import whole_file

BOUNDS = Bounds(max_difference=1e-3, mask_miou=0.999, iou_difference=1e-3)
"""Logits in any pixel; where SAM is sure of one they are beyond ±5. A pixel on the edge may flip."""


def export_onnx_decoder(model: onnx.ModelProto, reference: Reference, path: Path) -> dict[str, Any]:
    """Write an ONNX decoder.

    Args:
        model: from `decoder_model`.
        reference: whose decoder it is, and images with embeddings to compare on.
        path: of the file.

    Returns:
        Inputs, outputs and parity, for the manifest.

    Raises:
        ParityError: the file does not do what `SamPredictor` does.
    """
    sam = reference.decoder
    assert sam is not None
    cropped = "xtl" in {output.name for output in model.graph.output}
    with whole_file(path) as temporary:
        onnx.save(model, temporary)
        session = open_session(temporary)
        parity = within(path.name, decoder_parity(session, reference), BOUNDS)
    channels, cells = sam.prompt_encoder.embed_dim, sam.prompt_encoder.image_embedding_size[0]
    count = session.get_outputs()[1].shape[1]
    outputs: dict[str, Any] = {
        "masks": {"shape": [1, count, "height", "width"], "dtype": "float32", "values": "logits: object where > 0"},
        "iou_predictions": {"shape": [1, count], "dtype": "float32", "values": "predicted IoU of each mask"},
        "low_res_masks": {"shape": [1, count, 4 * cells, 4 * cells], "dtype": "float32", "values": "logits"},
    }
    if cropped:
        side = {"shape": [1], "dtype": "int64", "values": "first and last column and row of the object, both inside"}
        outputs["masks"] = {"shape": [1, 1, "rows", "columns"], "dtype": "uint8", "values": "1 on the object, else 0"}
        outputs |= dict.fromkeys(("xtl", "ytl", "xbr", "ybr"), side)
    return {
        "format": "onnx",
        "opset": opset_of(model),
        "precision": "float32",
        "inputs": {
            "image_embeddings": {"shape": [1, channels, cells, cells], "dtype": "float32"},
            "point_coords": {"shape": [1, "num_points", 2], "dtype": "float32", "values": VALUES["point_coords"]},
            "point_labels": {"shape": [1, "num_points"], "dtype": "float32", "values": VALUES["point_labels"]},
            "mask_input": {
                "shape": [1, 1, 4 * cells, 4 * cells],
                "dtype": "float32",
                "values": "low_res_masks of an earlier answer, or zeros",
            },
            "has_mask_input": {"shape": [1], "dtype": "float32", "values": "above 0 to heed mask_input"},
            "orig_im_size": {"shape": [2], "dtype": "float32", "values": "height, width of the image"},
        },
        "outputs": outputs,
        "masks": "one" if count == 1 else "4: the one for clear prompts, then three for ambiguous ones",
        "parity": parity,
    }


def low_res_model(sam: Sam, single: bool, opset: int = OLDEST_OPSET) -> onnx.ModelProto:
    """A decoder with segment-anything's inputs up to its low-resolution masks: one mask, chosen as `PromptDecoder`
    does, or all four."""
    cells = sam.prompt_encoder.image_embedding_size[0]
    example = (
        torch.zeros(1, sam.prompt_encoder.embed_dim, cells, cells),
        torch.zeros(1, 3, 2),
        torch.ones(1, 3),
        torch.zeros(1, 1, 4 * cells, 4 * cells),
        torch.zeros(1),
    )
    points = torch.export.Dim("num_points")
    return onnx_model(
        PromptDecoder(sam, single).eval(),
        example,
        opset,
        input_names=["image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input"],
        output_names=["low_res_masks", "iou_predictions"],
        dynamic_shapes=({}, {1: points}, {1: points}, {}, {}),
    )


def decoder_model(low_res: onnx.ModelProto, crop: bool = False) -> onnx.ModelProto:
    """A decoder of masks at the image's size, from a `low_res_model`; `crop`: of the object alone, as CVAT reads it."""
    from distill.export.onnx import postprocess  # onnxscript takes half a second to load

    whole = postprocess.append_postprocessing(postprocess.complete_prompts(low_res), crop)
    return in_opset(whole, opset_of(low_res))


def decoder_parity(session: onnxruntime.InferenceSession, reference: Reference) -> dict[str, Any]:
    """A decoder against `SamPredictor` on the same embeddings: some points, a box, both; on the first image each also
    with the mask of its first answer.

    Returns:
        The largest difference of logits, low-resolution ones among them, and of predicted IoUs; the mean IoU of masks.
    """
    single = session.get_outputs()[1].shape[1] == 1
    predictor = SamPredictor(reference.decoder)
    logits, predicted_ious, ious = [], [], []
    pairs = list(zip(reference.rows, reference.embeddings, strict=True))[:DECODER_IMAGES]
    for number, (row, embedding) in enumerate(pairs):
        place_embedding(predictor, embedding, row)
        for prompt in prompts_of(row):
            answer = predicted(predictor, prompt, single)
            asked = [(prompt, answer)]
            if not number:
                again = {**prompt, "mask_input": answer[2][0, :1]}
                asked.append((again, predicted(predictor, again, single)))
            for each, expected in asked:
                found = run_decoder(session, predictor, each)
                predicted_ious.append(difference(found["iou_predictions"], expected[1], "predicted IoUs"))
                logits.append(difference(found["low_res_masks"], expected[2], "low-resolution masks"))
                if "xtl" in found:
                    ious.append(mask_iou(uncropped(found, row.original_size), expected[0][0, 0] > 0))
                else:
                    logits.append(difference(found["masks"], expected[0], "masks"))
                    ious += map(mask_iou, found["masks"][0] > 0, expected[0][0] > 0)
    return figures(len(pairs), reference.images_from, logits, predicted_ious, ious)


def run_decoder(
    session: onnxruntime.InferenceSession, predictor: SamPredictor, prompt: Prompt
) -> dict[str, np.ndarray]:
    """What an ONNX decoder makes of a prompt, by the names of its outputs."""
    coords, labels = points_of(predictor, prompt)
    side = session.get_inputs()[3].shape[-1]
    earlier = prompt.get("mask_input")
    feeds = {
        "image_embeddings": predictor.features.numpy(),
        "point_coords": coords,
        "point_labels": labels,
        "mask_input": np.zeros((1, 1, side, side), np.float32) if earlier is None else earlier[None],
        "has_mask_input": np.array([0 if earlier is None else 1], np.float32),
        "orig_im_size": np.array(predictor.original_size, np.float32),
    }
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def uncropped(found: dict[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """A cropped mask in its place: boolean (H, W).

    Raises:
        ParityError: the crop is not of the size that its place says.
    """
    mask = np.zeros(size, dtype=bool)
    xtl, ytl, xbr, ybr = (int(found[name][0]) for name in ("xtl", "ytl", "xbr", "ybr"))
    if found["masks"].shape != (1, 1, ybr - ytl + 1, xbr - xtl + 1):
        raise ParityError(f"crops to {found['masks'].shape}, for columns {xtl} to {xbr} and rows {ytl} to {ybr}")
    mask[ytl : ybr + 1, xtl : xbr + 1] = found["masks"][0, 0] > 0
    return mask
