"""SAM's prompt encoder and mask decoder as one graph, for other runtimes.

The contract is that of segment-anything's `SamOnnxModel`, so that whatever reads its decoder reads ours; what comes out
is `SamPredictor`'s, also for what clients send that leave out or add something to that contract.
"""

import math
from copy import deepcopy

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam
from torch import nn

from distill.export.substitutes import for_runtimes

MASKS = 4
"""Masks that the decoder makes of a prompt: the one for clear prompts, and three for ambiguous ones."""

PAD, BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = -1, 0, 1, 2, 3
"""Labels of points. A prompt without a box ends in a point (0, 0) labelled PAD, as SAM was trained."""

VALUES = {
    "point_coords": "x, y in pixels of the resized image",
    "point_labels": "1 on the object, 0 off it, 2, 3 a box's corners, -1 the end (0, 0) of a prompt without box",
    "low_res_masks": "logits: object where > 0; the mask for clear prompts, then three for ambiguous ones",
    "iou_predictions": "predicted IoU of each mask",
}
"""What inputs and outputs mean, for manifests and packages."""


class PromptDecoder(nn.Module):
    """Embedding and prompt of one object → its low-resolution masks.

    Args:
        sam: whose prompt encoder and mask decoder.
        single: give one mask, the one that `SamPredictor` is asked for: one click is ambiguous, and of the three masks
            the one with the highest predicted IoU is taken; a box, or more clicks, are clear, and the first mask is.
            `SamOnnxModel` counts tokens, so that a box without padding is ambiguous to it, and two clicks without.
    """

    prompt_encoder: PromptEncoder
    mask_decoder: MaskDecoder
    image_pe: torch.Tensor

    def __init__(self, sam: Sam, single: bool = False) -> None:
        super().__init__()
        self.single = single
        self.prompt_encoder = for_runtimes(deepcopy(sam.prompt_encoder))
        self.mask_decoder = for_runtimes(deepcopy(sam.mask_decoder))
        self.image_size = sam.prompt_encoder.input_image_size[0]
        self.register_buffer("image_pe", sam.prompt_encoder.get_dense_pe().detach())

    def forward(
        self,
        image_embeddings: torch.Tensor,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
        mask_input: torch.Tensor | None = None,
        has_mask_input: torch.Tensor | float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode one prompt.

        Args:
            image_embeddings: float32 (1, C, h, w).
            point_coords: float32 (1, N, 2), x and y in pixels of the resized image.
            point_labels: float32 (1, N): `FOREGROUND` and so on.
            mask_input: float32 (1, 1, 4h, 4w), an earlier low-resolution mask; without it there is none.
            has_mask_input: float32 (1,), above 0 where `mask_input` is to be heeded.

        Returns:
            Logits (1, 4, 4h, 4w) and predicted IoUs (1, 4), the mask for clear prompts first; with `single`
            (1, 1, 4h, 4w) and (1, 1).
        """
        dense = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        if mask_input is not None:
            embedded = self.prompt_encoder.mask_downscaling(mask_input)
            dense = torch.where(torch.as_tensor(has_mask_input) > 0, embedded, dense)
        masks, ious = self.mask_decoder.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=self.image_pe,
            sparse_prompt_embeddings=self.embed_points(point_coords, point_labels),
            dense_prompt_embeddings=dense,
        )
        if not self.single:
            return masks, ious
        clear_first = torch.tensor([1000.0, 0.0, 0.0, 0.0])  # segment-anything's way to choose without a branch
        given = (point_labels >= 0).float().sum(dim=1)  # clicks, and corners of a box
        best = (ious + (given - 1.5) * clear_first).argmax(dim=1)
        return masks.index_select(1, best), ious.index_select(1, best)

    def embed_points(self, coords: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`PromptEncoder`'s points and box corners, (1, N, 2) and (1, N) → (1, N, C), without control flow.

        Positions are random Fourier features (arXiv:2304.02643, appendix A; arXiv:2006.10739), and each label adds an
        embedding of its own. A padding point has no position.
        """
        encoder = self.prompt_encoder
        centres = 2 * ((coords + 0.5) / self.image_size) - 1
        angles = 2 * math.pi * (centres @ encoder.pe_layer.positional_encoding_gaussian_matrix)
        labels = labels.unsqueeze(-1)
        embedded = torch.cat([angles.sin(), angles.cos()], dim=-1) * (labels != PAD)
        embedded = embedded + encoder.not_a_point_embed.weight * (labels == PAD)
        for label, embedding in enumerate(encoder.point_embeddings):
            embedded = embedded + embedding.weight * (labels == label)
        return embedded
