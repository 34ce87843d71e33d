"""EfficientViT-SAM's XL backbones (arXiv:2402.05008, section 3; arXiv:2205.14756), of timm's EfficientViT blocks.

timm has the L sizes, whose stages 3 and 4 have strides 16 and 32. XL has one stage more: its first four are of fused
MBConvs, the last two, at strides 32 and 64, of multi-scale linear attention that aggregates 3×3 neighbours.
"""

from collections.abc import Sequence
from functools import partial

from timm.layers import GELUTanh
from timm.models.efficientvit_mit import (
    EfficientVitBlock,
    EfficientVitLarge,
    EfficientVitLargeStage,
    LiteMLA,
    MBConv,
    ResidualBlock,
)
from torch import nn

NORM_EPS = 1e-6
"""Of every norm in EfficientViT-SAM."""


def efficientvit_xl(
    widths: Sequence[int] = (32, 64, 128, 256, 512, 1024),
    depths: Sequence[int] = (0, 1, 1, 2, 3, 3),
    head_dim: int = 32,
    norm_eps: float = NORM_EPS,
) -> nn.Module:
    """A timm `EfficientVitLarge` whose stages are XL's: (B, 3, S, S) → stages at strides 4, 8, 16, 32 and 64.

    Args:
        widths, depths: a value a stage, the stem's first.
        head_dim: channels an attention head.
        norm_eps: of batch norms.
    """
    # Its own last three stages are replaced, and so have no blocks.
    model = EfficientVitLarge(
        widths=tuple(widths),
        depths=(*depths[:3], *(0 for _ in depths[3:])),
        head_dim=head_dim,
        norm_eps=norm_eps,
        head_widths=(1, 1),
        num_classes=0,
    )
    norm = partial(nn.BatchNorm2d, eps=norm_eps)
    model.stages[2] = EfficientVitLargeStage(
        widths[2], widths[3], depth=depths[3], norm_layer=norm, act_layer=GELUTanh, head_dim=head_dim
    )
    for place, expand_ratio in ((3, 4), (4, 6)):
        channels, out = widths[place], widths[place + 1]
        blocks = [_downsampling(channels, out, 4 * expand_ratio, norm)]
        blocks += [_attention(out, head_dim, expand_ratio, norm) for _ in range(depths[place + 1])]
        model.stages[place].blocks = nn.Sequential(*blocks)
    return model


def _downsampling(channels: int, out: int, expand_ratio: int, norm: partial) -> nn.Module:
    block = MBConv(
        channels,
        out,
        stride=2,
        expand_ratio=expand_ratio,
        use_bias=(True, True, False),
        norm_layer=(None, None, norm),
        act_layer=(GELUTanh, GELUTanh, None),
    )
    return ResidualBlock(block, None)


def _attention(channels: int, head_dim: int, expand_ratio: int, norm: partial) -> nn.Module:
    block = EfficientVitBlock(
        channels, head_dim=head_dim, expand_ratio=expand_ratio, norm_layer=norm, act_layer=GELUTanh
    )
    block.context_module.main = LiteMLA(channels, channels, dim=head_dim, norm_layer=(None, norm), scales=(3,))
    return block
