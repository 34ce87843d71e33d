"""SAM's image encoder, with its own weights and faster attention.

segment-anything adds its decomposed relative positions (MViTv2, arXiv:2112.01526, section 4.1) to a full attention
matrix: 805 MB a block for ViT-B at 1024 px. But

    softmax(scale·q·k + q·Rh[row of k] + q·Rw[column of k])

is plain attention between longer vectors: q' = [scale·q, q·Rh, q·Rw], and k' = [k, one-hot row, one-hot column]. So
`scaled_dot_product_attention` computes it without the matrix, and exactly.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block, window_partition, window_unpartition
from torch import nn


def fuse_attention(encoder: ImageEncoderViT) -> None:
    """Replace every block of a SAM encoder by its `FusedBlock`; weights and their names stay what they are."""
    for number, block in enumerate(encoder.blocks):
        if isinstance(block, Block):
            encoder.blocks[number] = FusedBlock(block)


def encode_image(encoder: ImageEncoderViT, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`encoder(pixels)` with its blocks, which are nearly all of the work, at another precision.

    Patches, positions and the neck, whose norms would suffer most, stay in float32.

    Args:
        pixels: float32 (B, 3, S, S).
        dtype: what `encoder.blocks` was converted to.

    Returns:
        float32 (B, C, S/16, S/16).
    """
    tokens = encoder.patch_embed(pixels)
    if encoder.pos_embed is not None:
        tokens = tokens + encoder.pos_embed
    tokens = tokens.to(dtype)
    for block in encoder.blocks:
        tokens = block(tokens)
    return encoder.neck(tokens.float().permute(0, 3, 1, 2))


class FusedBlock(nn.Module):
    """The block it is made of, computed by fused attention: tokens (B, H, W, C) → (B, H, W, C)."""

    places: torch.Tensor
    row_distance: torch.Tensor
    column_distance: torch.Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.window_size = block.window_size
        if self.attn.use_rel_pos:
            height, width = ((len(table) + 1) // 2 for table in (self.attn.rel_pos_h, self.attn.rel_pos_w))
            rows, columns = torch.eye(height).repeat_interleave(width, 0), torch.eye(width).repeat(height, 1)
            self.register_buffer("places", torch.cat([rows, columns], 1), persistent=False)
            self.register_buffer("row_distance", _distances(height), persistent=False)
            self.register_buffer("column_distance", _distances(width), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self._attend(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))

    def _attend(self, tokens: torch.Tensor) -> torch.Tensor:
        size = (tokens.shape[1], tokens.shape[2])
        if self.window_size:
            # Padding is zero before the bias of qkv and takes part in attention, as in the original.
            tokens, padded = window_partition(tokens, self.window_size)
        count, height, width, channels = tokens.shape
        attn: Attention = self.attn
        qkv = attn.qkv(tokens).view(count, height * width, 3, attn.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if attn.use_rel_pos:
            query, key = self._add_positions(query, key, height, width)
            scale = 1.0
        else:
            scale = attn.scale
        # The fused kernels want one width for all three.
        extra = query.shape[-1] - value.shape[-1]
        seen = F.scaled_dot_product_attention(query, key, F.pad(value, (0, extra)), scale=scale)[..., : value.shape[-1]]
        tokens = seen.transpose(1, 2).reshape(count, height, width, channels)
        if self.window_size:
            tokens = window_unpartition(tokens, self.window_size, padded, size)
        return attn.proj(tokens)

    def _add_positions(
        self, query: torch.Tensor, key: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k (n, heads, h·w, d) → q' and k' (n, heads, h·w, d + h + w)."""
        grid = query.unflatten(2, (height, width))
        by_row = torch.einsum("nahwc,hkc->nahwk", grid, self.attn.rel_pos_h[self.row_distance])
        by_column = torch.einsum("nahwc,wkc->nahwk", grid, self.attn.rel_pos_w[self.column_distance])
        longer = torch.cat([query * self.attn.scale, by_row.flatten(2, 3), by_column.flatten(2, 3)], -1)
        places = self.places.to(key.dtype).expand(*key.shape[:2], -1, -1)
        return longer, torch.cat([key, places], -1)


def _distances(size: int) -> torch.Tensor:
    """Row of the relative-position table for each pair of query and key, (size, size)."""
    coordinates = torch.arange(size)
    return coordinates[:, None] - coordinates + size - 1
