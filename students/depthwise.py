"""Depthwise 1×1 convolutions, which RepViT's blocks have beside their 3×3 ones, as the products that they are."""

import torch
from torch import nn


class ChannelScale(nn.Conv2d):
    """A convolution that multiplies each channel by a number, without one.

    PyTorch's CPU convolution goes through the channels one by one where it has a single thread: a training step of the
    quickstart's RepViT takes 1.4 times as long, and 1.1 times with two threads.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) → the same."""
        scaled = x * self.weight.view(1, -1, 1, 1)
        return scaled if self.bias is None else scaled + self.bias.view(1, -1, 1, 1)


def scale_channels(model: nn.Module) -> None:
    """Put `ChannelScale` in the place of every depthwise 1×1 convolution, with its very parameters."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.Conv2d and _only_scales(module):
                scale = ChannelScale(
                    module.in_channels, module.out_channels, 1, groups=module.groups, bias=module.bias is not None,
                    device="meta",
                )  # fmt: skip
                scale.weight, scale.bias = module.weight, module.bias
                setattr(parent, name, scale.train(module.training))


def _only_scales(module: nn.Conv2d) -> bool:
    depthwise = module.groups == module.in_channels == module.out_channels
    return depthwise and module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding == (0, 0)
