"""Necks: what makes SAM's embedding of a backbone's stages; and the reduction that stands before a backbone."""

from collections.abc import Sequence
from functools import partial, reduce
from operator import add

import torch
from segment_anything.modeling.common import LayerNorm2d
from timm.layers import GELUTanh
from timm.models.efficientvit_mit import ConvNormAct, FusedMBConv, ResidualBlock
from torch import nn
from torch.nn.functional import conv2d, pad

from students.efficientvit import NORM_EPS


def sam_neck(channels: int, out_channels: int) -> nn.Sequential:
    """The neck of SAM's own encoder (arXiv:2304.02643, appendix A): (B, channels, h, w) → (B, out_channels, h, w)."""
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )


class StageFusion(nn.Module):
    """The last two stages, brought to one width by 1×1 convolutions, the last one enlarged, and added (EdgeSAM)."""

    def __init__(self, middle_channels: int, last_channels: int, out_channels: int) -> None:
        super().__init__()
        self.middle = nn.Conv2d(middle_channels, out_channels, kernel_size=1, bias=False)
        self.last = nn.Conv2d(last_channels, out_channels, kernel_size=1, bias=False)
        self.enlarge = nn.Upsample(scale_factor=2, mode="bicubic")

    def forward(self, middle: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """(B, C₁, h, w) and (B, C₂, h/2, w/2) → (B, out_channels, h, w)."""
        return self.middle(middle) + self.enlarge(self.last(last))


class PyramidNeck(nn.Module):
    """EfficientViT-SAM's neck (arXiv:2402.05008, section 3).

    Stages through 1×1 convolutions, brought to the embedding's grid (bicubic) and added; residual fused MBConvs; and
    out through a 1×1 convolution and a LayerNorm, as SAM's own neck ends in one.

    Args:
        channels: of each stage, the finest first.
        factors: cells of the embedding's grid a cell of each stage, along each side; ½, 1, 2, ...
        out_channels: of the embedding, and of everything within.
        depth: fused MBConvs.
        expand_ratio: theirs.
    """

    def __init__(
        self, channels: Sequence[int], factors: Sequence[float], out_channels: int, depth: int, expand_ratio: int
    ) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, eps=NORM_EPS)
        width = out_channels
        self.inputs = nn.ModuleList(ConvNormAct(c, width, 1, norm_layer=norm, act_layer=None) for c in channels)
        self.resize = nn.ModuleList(
            nn.Identity() if factor == 1 else nn.Upsample(scale_factor=factor, mode="bicubic") for factor in factors
        )
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(
                    FusedMBConv(width, width, expand_ratio=expand_ratio, norm_layer=norm, act_layer=(GELUTanh, None)),
                    nn.Identity(),
                )
                for _ in range(depth)
            )
        )
        self.out = nn.Conv2d(width, out_channels, kernel_size=1)
        self.norm = LayerNorm2d(out_channels)

    def forward(self, *stages: torch.Tensor) -> torch.Tensor:
        """(B, Cᵢ, h/fᵢ, w/fᵢ) of each stage, the finest first → (B, out_channels, h, w)."""
        brought = (
            resize(project(stage)) for project, resize, stage in zip(self.inputs, self.resize, stages, strict=True)
        )
        return self.norm(self.out(self.blocks(reduce(add, brought))))


class Reduction(nn.Module):
    """Images at 1/`ratio` of their size, antialiased: `interpolate(mode="bilinear", antialias=True)`, as Pillow's
    `BILINEAR`, by a convolution, which every runtime has; zeros stay zeros.

    A triangle of `ratio` pixels to each side, sampled at the pixels' centres; at the border over those that are there.
    """

    kernel: torch.Tensor

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        taps = 2 * ratio - ratio % 2
        weights = [(ratio - abs(tap - (taps - 1) / 2)) / ratio**2 for tap in range(taps)]
        self.padding = (taps - ratio) // 2
        self.at_border = sum(weights[self.padding :])
        along = torch.tensor(weights)
        self.register_buffer("kernel", torch.outer(along, along).repeat(3, 1, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → (B, 3, H/ratio, W/ratio)."""
        reduced = conv2d(image, self.kernel.to(image.dtype), stride=self.ratio, padding=self.padding, groups=3)
        rows, columns = (self._there(side, reduced) for side in reduced.shape[-2:])
        return reduced / rows[:, None] / columns

    def _there(self, side: int, like: torch.Tensor) -> torch.Tensor:
        """The sum of the weights that do not lie outside, along a side: less than 1 for the first and the last."""
        return pad(torch.ones(side - 2, dtype=like.dtype, device=like.device), (1, 1), value=self.at_border)
