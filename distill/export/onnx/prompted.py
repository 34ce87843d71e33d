"""`prompt_encoder_mask_decoder.onnx`, as transformers cuts SAM for ONNX: many prompts on many images, three masks each,
compared with `SamPredictor` before it is kept."""

from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from distill.evaluate.ious import mask_iou
from distill.export.batch import BatchDecoder
from distill.export.decoder import BACKGROUND, BOTTOM_RIGHT, FOREGROUND, PAD, TOP_LEFT, VALUES
from distill.export.onnx.decoder import BOUNDS
from distill.export.onnx.file import onnx_model, open_session, opset_of
from distill.export.onnx.float16 import in_float16
from distill.export.onnx.int8 import INT8, WEIGHTS_ALONE
from distill.export.onnx.small_weights import with_int8_weights
from distill.export.onnx.tensorrt import DECODER_BOUNDS, IN_FLOAT32, TURNS
from distill.export.prompts import (
    DECODER_IMAGES,
    GATE_IMAGES,
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

THREE = slice(1, None)
"""transformers gives the three masks for ambiguous prompts, and not the one for clear prompts, which comes first."""


class TransformersDecoder(BatchDecoder):
    """Embeddings of images and prompts on each → three masks of every prompt."""

    def forward(  # type: ignore[override]
        self,
        input_points: torch.Tensor,
        input_labels: torch.Tensor,
        image_embeddings: torch.Tensor,
        image_positional_embeddings: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode P prompts on each of B images.

        Args:
            input_points: float32 (B, P, N, 2), x and y in pixels of the resized image.
            input_labels: int64 (B, P, N): `FOREGROUND` and so on; negative where there is no point.
            image_embeddings: float32 (B, C, h, w).
            image_positional_embeddings: float32 (B, C, h, w).

        Returns:
            Predicted IoUs (B, P, 3) and logits (B, P, 3, 4h, 4w).
        """
        prompts = input_points.shape[1]
        sparse, there = self.tokens(input_points.flatten(0, 1), input_labels.flatten(0, 1))
        embeddings, places = (
            each.unsqueeze(1).expand(-1, prompts, -1, -1, -1).flatten(0, 1)
            for each in (image_embeddings, image_positional_embeddings)
        )
        dense = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        masks, ious = self.predict(embeddings, dense, sparse, there, places)
        masks, ious = masks[:, THREE], ious[:, THREE]
        return ious.unflatten(0, (-1, prompts)), masks.unflatten(0, (-1, prompts))


def prompt_model(sam: Sam, opset: int = OLDEST_OPSET) -> onnx.ModelProto:
    """A `TransformersDecoder` of any number of images, prompts and points."""
    cells = sam.prompt_encoder.image_embedding_size[0]
    # Each a tensor of its own: one that is handed over twice is one input to the exporter.
    grids = (torch.zeros(2, sam.prompt_encoder.embed_dim, cells, cells) for _ in range(2))
    example = (torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, dtype=torch.int64), *grids)
    images, prompts, points = (torch.export.Dim(f"num_{each}") for each in ("images", "prompts", "points"))
    asked = {0: images, 1: prompts, 2: points}
    return onnx_model(
        TransformersDecoder(sam).eval(),
        example,
        opset,
        input_names=["input_points", "input_labels", "image_embeddings", "image_positional_embeddings"],
        output_names=["iou_scores", "pred_masks"],
        dynamic_shapes=(asked, asked, {0: images}, {0: images}),
    )


def prompt_model_in(precision: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a `prompt_model` in a precision: float16 but for norms and the places of points; in int8 weights are,
    and it computes in float32."""
    if precision == "float16":
        return in_float16(model, IN_FLOAT32, TURNS)
    model = deepcopy(model)
    return with_int8_weights(model, [node.name for node in model.graph.node]) if precision == "int8" else model


def export_prompt_decoder(
    model: onnx.ModelProto, reference: Reference, path: Path, precision: str = "float32"
) -> dict[str, Any]:
    """Write a decoder from `prompt_model_in`.

    Raises:
        ParityError: the file does not do what `SamPredictor` does.
    """
    eight_bit = Bounds(mask_miou=INT8.mask_miou, mask_iou_p5=INT8.mask_iou_p5)
    bounds = {"float32": BOUNDS, "float16": DECODER_BOUNDS, "int8": eight_bit}[precision]
    images = GATE_IMAGES if precision == "int8" else DECODER_IMAGES
    with whole_file(path) as temporary:
        onnx.save(model, temporary)
        session = open_session(temporary)
        parity = within(path.name, prompt_parity(session, reference, images), bounds)
    shapes = {each.name: {"shape": each.shape} for each in (*session.get_inputs(), *session.get_outputs())}
    told = {
        "input_points": {"dtype": "float32", "values": VALUES["point_coords"]},
        "input_labels": {
            "dtype": "int64",
            "values": f"{FOREGROUND} on the object, {BACKGROUND} off it, {TOP_LEFT}, {BOTTOM_RIGHT} a box's corners, "
            f"{PAD} where there is no point",
        },
        "image_embeddings": {"dtype": "float32"},
        "image_positional_embeddings": {"dtype": "float32"},
        "iou_scores": {"dtype": "float32", "values": VALUES["iou_predictions"]},
        "pred_masks": {"dtype": "float32", "values": "logits: object where > 0; the three for ambiguous prompts"},
    }
    described = {name: {**shapes[name], **entry} for name, entry in told.items()}
    return {
        "format": "onnx",
        "opset": opset_of(model),
        "precision": WEIGHTS_ALONE if precision == "int8" else precision,
        "inputs": {each.name: described[each.name] for each in session.get_inputs()},
        "outputs": {each.name: described[each.name] for each in session.get_outputs()},
        "parity": parity,
    }


def prompt_parity(
    session: onnxruntime.InferenceSession, reference: Reference, images: int = DECODER_IMAGES
) -> dict[str, Any]:
    """A decoder against `SamPredictor`'s three masks on the first so many images, prompt by prompt, without their ends;
    and the first again as two prompts of one call."""
    sam = cast(Sam, reference.decoder)
    predictor = SamPredictor(sam)
    places = sam.prompt_encoder.get_dense_pe().detach().numpy()
    logits, predicted_ious = [], []
    ious: list[float] = []
    pairs = list(zip(reference.rows, reference.embeddings, strict=True))[:images]
    for row, embedding in pairs:
        place_embedding(predictor, embedding, row)
        for number, prompt in enumerate(prompts_of(row)):
            _, expected_iou, expected = (part[:, THREE] for part in predicted(predictor, prompt, False))
            coords, labels = points_of(predictor, prompt)
            given = labels[0] != PAD
            points, kinds = coords[:, None, given], labels[:, None, given].astype(np.int64)
            copies = 1 if number else 2
            feeds = {
                "input_points": np.repeat(points, copies, axis=1),
                "input_labels": np.repeat(kinds, copies, axis=1),
                "image_embeddings": embedding,
                "image_positional_embeddings": places,
            }
            iou, low_res = session.run(["iou_scores", "pred_masks"], feeds)
            for place in range(copies):
                logits.append(difference(low_res[:, place], expected, "low-resolution masks"))
                predicted_ious.append(difference(iou[:, place], expected_iou, "predicted IoUs"))
                ious += map(mask_iou, low_res[0, place] > 0, expected[0] > 0)
    return figures(len(pairs), reference.images_from, logits, predicted_ious, ious)
