"""Attention with SAM's decomposed relative positions (MViTv2, arXiv:2112.01526, section 4.1), computed exactly.

    softmax(scale·q·k + q·Rh[row of k] + q·Rw[column of k]) v

segment-anything adds the two position terms to a full matrix of scores: 805 MB a block for ViT-B at 1024 px. Here
`scaled_dot_product_attention` does without that matrix, in the way that suits the device, but for windows on a GPU,
where it is small.
"""

import torch
import torch.nn.functional as F

FEW_TOKENS = 256
"""A window of SAM's has 196, the whole grid 4,096 at 1024 px."""
SCORES_AT_A_TIME = 1 << 24
"""On a CPU: 64 MB in float32. Fewer, and its kernel has too few queries to share out."""


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, by_row: torch.Tensor, by_column: torch.Tensor
) -> torch.Tensor:
    """Attention of h·w tokens on a grid, by the kernels of the device.

    Args:
        query, key, value: (n, heads, h·w, d).
        by_row: (n, heads, h, w, h), the position term of each query for each row of keys; by_column:
            (n, heads, h, w, w), likewise for columns.

    Returns:
        (n, heads, h·w, d).
    """
    if query.device.type == "cpu":
        way = sliced_attention
    else:
        way = masked_attention if query.shape[2] <= FEW_TOKENS else folded_attention
    return way(query, key, value, by_row, by_column)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, by_row: torch.Tensor, by_column: torch.Tensor
) -> torch.Tensor:
    """With the position terms as the mask: of few tokens it is small, and nothing is copied into longer vectors."""
    mask = (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(4).flatten(2, 3)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def folded_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, by_row: torch.Tensor, by_column: torch.Tensor
) -> torch.Tensor:
    """As plain attention between longer vectors: [scale·q, q·Rh, q·Rw] and [k, one-hot row, one-hot column]."""
    height, width = by_row.shape[-1], by_column.shape[-1]
    rows = torch.eye(height, dtype=key.dtype, device=key.device).repeat_interleave(width, 0)
    columns = torch.eye(width, dtype=key.dtype, device=key.device).repeat(height, 1)
    places = torch.cat([rows, columns], 1).expand(*key.shape[:2], -1, -1)
    size = value.shape[-1]
    query = torch.cat([query * size**-0.5, by_row.flatten(2, 3), by_column.flatten(2, 3)], -1)
    # The fused kernels want one width for all three.
    value = F.pad(value, (0, height + width))
    return F.scaled_dot_product_attention(query, torch.cat([key, places], -1), value, scale=1.0)[..., :size]


def sliced_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, by_row: torch.Tensor, by_column: torch.Tensor
) -> torch.Tensor:
    """With the position terms of some query rows at a time as the mask, in memory that is used again and again.

    On a CPU the longer vectors would cost twice as much: ViT-B's are three times as long.
    """
    count, heads, height, width, _ = by_row.shape
    row = heads * width * height * width
    windows = min(count, max(1, SCORES_AT_A_TIME // (row * height)))
    rows = min(height, max(1, SCORES_AT_A_TIME // row))
    mask = query.new_empty(windows, heads, rows, width, height, width)
    attended = torch.empty_like(query)
    for first in range(0, count, windows):
        some = slice(first, first + windows)
        for top in range(0, height, rows):
            part = (some, slice(None), slice(top, top + rows))
            terms = (by_row[part].unsqueeze(-1), by_column[part].unsqueeze(-2))
            bias = torch.add(*terms, out=mask[: len(terms[0]), :, : terms[0].shape[2]]).flatten(4).flatten(2, 3)
            queries = slice(top * width, (top + rows) * width)
            attended[some, :, queries] = F.scaled_dot_product_attention(
                query[some, :, queries], key[some], value[some], attn_mask=bias
            )
    return attended
