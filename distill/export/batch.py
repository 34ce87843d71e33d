"""SAM's prompt encoder and mask decoder for many prompts in a pass, whose points need not be equally many."""

import math

import torch
from segment_anything.modeling import Sam
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer
from torch import nn
from torch.nn.functional import pad

from distill.export.decoder import BACKGROUND, PAD, TOP_LEFT, PromptDecoder

OUT_OF_SIGHT = -3e4
"""Added to a score, for a token that is not there: its exponential is 0, and float16 holds it."""


class BatchDecoder(PromptDecoder):
    """Embedding and many prompts → all low-resolution masks of each, in one pass: a grid of points, say.

    Prompts are filled up with points labelled `PAD`, which are not there. To SAM a padding point is a token that all
    others attend to, and one more of them changes the masks; here they are hidden from attention, and the one that SAM
    was trained with at the end of a prompt without a box is added, so that a graph of fixed size takes any prompt.
    """

    def __init__(self, sam: Sam) -> None:
        super().__init__(sam)
        self.transformer = HidingTransformer(self.mask_decoder.transformer)

    def forward(  # type: ignore[override]
        self,
        image_embeddings: torch.Tensor,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
        mask_input: torch.Tensor | None = None,
        has_mask_input: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode P prompts on one image.

        Args:
            image_embeddings: float32 (1, C, h, w).
            point_coords: float32 (P, N, 2), x and y in pixels of the resized image.
            point_labels: float32 (P, N): `FOREGROUND` and so on; `PAD` where there is no point.
            mask_input: float32 (P, 1, 4h, 4w), earlier low-resolution masks; without them there are none.
            has_mask_input: float32 (P,), above 0 where the earlier mask is to be heeded.

        Returns:
            Logits (P, 4, 4h, 4w) and predicted IoUs (P, 4), the mask for clear prompts first.
        """
        dense = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        if mask_input is not None and has_mask_input is not None:
            embedded = self.prompt_encoder.mask_downscaling(mask_input)
            dense = torch.where(has_mask_input.reshape(-1, 1, 1, 1) > 0, embedded, dense)
        return self.predict(image_embeddings, dense, *self.tokens(point_coords, point_labels))

    def tokens(self, coords: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Points (P, N, 2) and labels (P, N), embedded with an end, (P, N + 1, C), and 1 for each token that is there,
        (P, N + 1)."""
        boxed = (labels >= TOP_LEFT).float().amax(1, keepdim=True)
        clicked = (labels >= BACKGROUND).float().amax(1, keepdim=True)
        there = torch.cat([(labels >= BACKGROUND).float(), clicked * (1 - boxed)], dim=1)
        return self.embed_points(pad(coords, (0, 0, 0, 1)), pad(labels, (0, 1), value=PAD)), there

    def predict(
        self,
        embedding: torch.Tensor,
        dense: torch.Tensor,
        sparse: torch.Tensor,
        there: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`MaskDecoder.predict_masks` for prompts (P, T, C) of which some tokens are `there`, (P, T), on one embedding
        or one each; `positions` are the image's, where they come from outside."""
        decoder = self.mask_decoder
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        prompts = sparse.shape[0]
        tokens = torch.cat([own.expand(prompts, -1, -1), sparse], dim=1)
        hidden = pad((1 - there) * OUT_OF_SIGHT, (own.shape[0], 0))
        image = (embedding + dense).expand(prompts, -1, -1, -1)
        tokens, cells = self.transformer(image, self.image_pe if positions is None else positions, tokens, hidden)
        enlarged = decoder.output_upscaling(cells.transpose(1, 2).reshape(image.shape))
        of_masks = tokens[:, 1 : own.shape[0]]
        weights = torch.stack([mlp(of_masks[:, n]) for n, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1)
        masks = weights @ enlarged.flatten(2)
        return masks.reshape(prompts, -1, *enlarged.shape[2:]), decoder.iou_prediction_head(tokens[:, 0])


class HidingTransformer(nn.Module):
    """segment-anything's `TwoWayTransformer` (arXiv:2304.02643, appendix A), with tokens that are out of sight."""

    def __init__(self, transformer: TwoWayTransformer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(HidingBlock, transformer.layers))
        self.last = HidingAttention(transformer.final_attn_token_to_image)
        self.norm = transformer.norm_final_attn

    def forward(
        self, image: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (P, C, h, w), positions (1, C, h, w), tokens (P, T, C) and what is added to scores of each, (P, T) →
        tokens (P, T, C) and cells (P, h·w, C)."""
        cells, positions = image.flatten(2).transpose(1, 2), positions.flatten(2).transpose(1, 2)
        asked, hidden = tokens, hidden[:, None, None]
        for layer in self.layers:
            tokens, cells = layer(tokens, cells, asked, positions, hidden)
        found = self.last(tokens + asked, cells + positions, cells)
        return self.norm(tokens + found), cells


class HidingBlock(nn.Module):
    """`TwoWayAttentionBlock`: tokens attend to tokens, then to the image, and the image to tokens."""

    def __init__(self, block: TwoWayAttentionBlock) -> None:
        super().__init__()
        self.first = block.skip_first_layer_pe
        self.among_tokens = HidingAttention(block.self_attn)
        self.to_image = HidingAttention(block.cross_attn_token_to_image)
        self.to_tokens = HidingAttention(block.cross_attn_image_to_token)
        self.mlp = block.mlp
        self.norms = nn.ModuleList([block.norm1, block.norm2, block.norm3, block.norm4])

    def forward(
        self,
        tokens: torch.Tensor,
        cells: torch.Tensor,
        asked: torch.Tensor,
        positions: torch.Tensor,
        hidden: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        placed = tokens if self.first else tokens + asked
        found = self.among_tokens(placed, placed, tokens, hidden)
        tokens = self.norms[0](found if self.first else tokens + found)
        tokens = self.norms[1](tokens + self.to_image(tokens + asked, cells + positions, cells))
        tokens = self.norms[2](tokens + self.mlp(tokens))
        cells = self.norms[3](cells + self.to_tokens(cells + positions, tokens + asked, tokens, hidden))
        return tokens, cells


class HidingAttention(nn.Module):
    """`Attention`, with something added to the scores of each key."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
        self.heads = attention.num_heads
        self.scale = 1 / math.sqrt(attention.internal_dim // attention.num_heads)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(P, A, C), (P, B, C), (P, B, C) and (P, 1, 1, B) → (P, A, C)."""
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.q(q) * self.scale, self.k(k), self.v(v))
        )
        scores = q @ k.transpose(2, 3)
        weights = (scores if hidden is None else scores + hidden).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))
