"""SAM's image encoder with its own weights, and blocks that are as fast as the device allows."""

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block, window_partition, window_unpartition
from torch import nn

from embeddings_cache.teacher.attention import attention


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

    row_distance: torch.Tensor
    column_distance: torch.Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.window_size = block.window_size
        if self.attn.use_rel_pos:
            for name, table in (("row_distance", self.attn.rel_pos_h), ("column_distance", self.attn.rel_pos_w)):
                self.register_buffer(name, _distances((len(table) + 1) // 2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self._attend(self.norm1(tokens))
        hidden = self.mlp.act(_linear(self.mlp.lin1, self.norm2(tokens)))
        return tokens + _linear(self.mlp.lin2, hidden)

    def _attend(self, tokens: torch.Tensor) -> torch.Tensor:
        size = (tokens.shape[1], tokens.shape[2])
        if self.window_size:
            # Padding is zero before the bias of qkv and takes part in attention, as in the original.
            tokens, padded = window_partition(tokens, self.window_size)
        count, height, width, channels = tokens.shape
        attn: Attention = self.attn
        qkv = _linear(attn.qkv, tokens).reshape(count, height * width, 3, attn.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if attn.use_rel_pos:
            attended = attention(query, key, value, *self._position_terms(query.unflatten(2, (height, width))))
        else:
            attended = F.scaled_dot_product_attention(query, key, value)
        tokens = attended.transpose(1, 2).reshape(count, height, width, channels)
        if self.window_size:
            tokens = window_unpartition(tokens, self.window_size, padded, size)
        return _linear(attn.proj, tokens)

    def _position_terms(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, heads, h, w, d) → q·Rh (n, heads, h, w, h) and q·Rw (n, heads, h, w, w)."""
        by_row = torch.einsum("nahwc,hkc->nahwk", query, self.attn.rel_pos_h[self.row_distance])
        by_column = torch.einsum("nahwc,wkc->nahwk", query, self.attn.rel_pos_w[self.column_distance])
        return by_row, by_column


def _linear(layer: nn.Linear, tokens: torch.Tensor) -> torch.Tensor:
    """`layer(tokens)` of (B, H, W, C) tokens; in float32 on x86, as the 1×1 convolution that it is.

    There PyTorch gives matrix products to MKL, which makes half of an AMD CPU's speed, and convolutions to oneDNN.
    """
    mkl = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if tokens.device.type == "cpu" and tokens.dtype == torch.float32 and mkl:
        return F.conv2d(tokens.permute(0, 3, 1, 2), layer.weight[:, :, None, None], layer.bias).permute(0, 2, 3, 1)
    return layer(tokens)


def _distances(size: int) -> torch.Tensor:
    """Row of the relative-position table for each pair of query and key, (size, size)."""
    coordinates = torch.arange(size)
    return coordinates[:, None] - coordinates + size - 1
