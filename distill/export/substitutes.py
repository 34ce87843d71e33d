"""What other runtimes lack, or compute less well, by what comes to the same."""

import torch
from segment_anything.modeling.common import LayerNorm2d
from timm.layers.grn import GlobalResponseNorm
from timm.models.efficientvit_mit import LiteMLA
from torch import nn
from torch.nn.functional import conv2d, layer_norm, pad, pixel_shuffle, relu


def for_runtimes(module: nn.Module) -> nn.Module:
    """Put substitutes into a module, in place."""
    for name, child in module.named_children():
        if isinstance(child, LayerNorm2d):
            setattr(module, name, ChannelNorm(child))
        elif isinstance(child, LiteMLA):
            setattr(module, name, LinearAttention(child))
        elif isinstance(child, GlobalResponseNorm):
            setattr(module, name, ResponseNorm(child))
        elif isinstance(child, nn.Upsample) and child.mode == "bicubic":
            setattr(module, name, bicubic(float(child.scale_factor)))  # type: ignore[arg-type]
        else:
            for_runtimes(child)
    return module


class ChannelNorm(nn.Module):
    """segment-anything's `LayerNorm2d`, (B, C, h, w) → (B, C, h, w), by PyTorch's layer norm.

    Spelled out as a mean of squares it overflows in float16 where an activation is beyond 255; the operator computes
    its statistics in float32.
    """

    def __init__(self, norm: LayerNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = x.permute(0, 2, 3, 1)
        return layer_norm(last, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class LinearAttention(nn.Module):
    """EfficientViT's multi-scale linear attention (arXiv:2205.14756, section 3.1), (B, C, h, w) → (B, C, h, w), in
    which no value exceeds `dim` times the largest that comes in.

    Spelled out, qᵀ(Σₙ kₙ vₙᵀ) / qᵀ(Σₙ kₙ) sums products over all N cells, and overflows in float16. Here both sums are
    means over the cells, and factors are taken out that cancel: of the keys the largest value of each channel, which is
    given back, over the largest of all, to the sums; of each query its largest channel. Nothing is multiplied but by
    matrices, for products are what ONNX Runtime's quantisation takes to 8 bits.
    """

    def __init__(self, attention: LiteMLA) -> None:
        super().__init__()
        self.dim = attention.dim
        self.qkv, self.aggreg, self.proj = attention.qkv, attention.aggreg, attention.proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        qkv = self.qkv(x)
        scales = torch.cat([qkv, *(aggregate(qkv) for aggregate in self.aggreg)], dim=1)
        q, k, v = scales.reshape(batch, -1, 3 * self.dim, height * width).chunk(3, dim=2)  # (B, heads, dim, N)
        q, k = relu(q), relu(k)
        root = (height * width) ** 0.5
        largest = or_one(k.amax(3, keepdim=True))
        ones = pad(v / root, (0, 0, 0, 1), value=1 / root)  # the last row's sums are those of the keys
        sums = ones @ (k / largest / root).transpose(2, 3)  # (B, heads, dim + 1, dim)
        sums = sums / (largest.amax(2, keepdim=True) / largest).transpose(2, 3)
        attended = sums @ (q / or_one(q.amax(2, keepdim=True)))
        attended = attended[:, :, :-1] / or_one(attended[:, :, -1:])
        return self.proj(attended.reshape(batch, -1, height, width))


class ResponseNorm(nn.Module):
    """ConvNeXt V2's global response normalisation (arXiv:2301.00808, section 4), of a map with channels first or last.

    A channel's norm over all cells is a root of a sum of squares, which overflows in float16; here it is one of their
    mean, of values by the largest, for only ratios of norms are used.
    """

    def __init__(self, norm: GlobalResponseNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.shape = norm.weight, norm.bias, norm.wb_shape
        self.spatial, self.channel = norm.spatial_dim, norm.channel_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x / or_one(x.abs().amax((1, 2, 3), keepdim=True))
        norms = scaled.square().mean(self.spatial, keepdim=True).sqrt()
        shares = norms / or_one(norms.mean(self.channel, keepdim=True))
        return x + (self.bias.view(self.shape) + self.weight.view(self.shape) * (x * shares))


def or_one(x: torch.Tensor) -> torch.Tensor:
    """A divisor that is not negative; 1 where it is 0, as all that it would divide is."""
    return torch.where(x > 0, x, torch.ones_like(x))


def bicubic(factor: float) -> nn.Module:
    """PyTorch's bicubic interpolation by 2, 4, ... or ½ as a convolution, which every runtime has."""
    assert factor == 0.5 or factor == int(factor), factor
    return BicubicHalving() if factor == 0.5 else BicubicEnlarging(int(factor))


class BicubicEnlarging(nn.Module):
    """(B, C, h, w) → (B, C, n·h, n·w).

    n output pixels lie in each input pixel along each axis, and each has a set of weights: Keys' cubic convolution with
    a = −0.75 ("Cubic convolution interpolation for digital image processing", 1981), over the four pixels around; the
    border is repeated.
    """

    kernels: torch.Tensor

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        places = [(phase + 0.5) / times - 0.5 for phase in range(times)]  # from the input pixel's centre
        along = [torch.tensor([*cubic(1 + t), 0.0] if t < 0 else [0.0, *cubic(t)], dtype=torch.float64) for t in places]
        self.register_buffer("kernels", torch.stack([torch.outer(y, x) for y in along for x in along])[:, None].float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        phases = conv2d(pad(x, (2, 2, 2, 2), mode="replicate"), self.kernels.repeat(channels, 1, 1, 1), groups=channels)
        return pixel_shuffle(phases, self.times)


class BicubicHalving(nn.Module):
    """(B, C, h, w) → (B, C, h/2, w/2): `BicubicEnlarging`'s weights in the middle between two pixels."""

    kernel: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        along = torch.tensor(cubic(0.5), dtype=torch.float64)
        self.register_buffer("kernel", torch.outer(along, along)[None, None].float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        padded = pad(x, (1, 1, 1, 1), mode="replicate")
        return conv2d(padded, self.kernel.repeat(channels, 1, 1, 1), stride=2, groups=channels)


def cubic(t: float, a: float = -0.75) -> list[float]:
    """Weights of the four pixels around a place that lies t behind the second."""

    def near(x: float) -> float:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1

    def far(x: float) -> float:
        return a * (x**3 - 5 * x**2 + 8 * x - 4)

    return [far(1 + t), near(t), near(1 - t), far(2 - t)]
