"""Students as trained ones are: with norms that do something, and attention that sums to large numbers."""

import torch
from segment_anything.modeling.common import LayerNorm2d
from timm.models.efficientvit_mit import LiteMLA
from torch import nn

from students import StudentEncoder, create_student

NARROW = {
    "repvit_m0_9": {"widths": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "tiny_vit_5m": {"widths": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "efficientvit_b1": {"widths": [8, 16, 32, 64, 64], "depths": [1, 1, 1, 1, 1]},
    "efficientvit_l1": {"widths": [8, 16, 32, 64, 64], "depths": [1, 1, 1, 1, 2]},
    "efficientvit_xl0": {"widths": [8, 16, 16, 32, 64, 64]},
    "convnext_atto": {"widths": [16, 32, 64, 96], "depths": [1, 1, 2, 1]},
    "convnextv2_atto": {"widths": [16, 32, 64, 96], "depths": [1, 1, 2, 1]},
}
"""Numbers that make small models of large ones."""


def randomize_norms(model: nn.Module) -> nn.Module:
    """Give every norm the statistics and weights of a trained one; at their initial values fusing proves nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | LayerNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model


def small_pyramid(name: str, image_size: int = 128) -> StudentEncoder:
    """A student with a pyramid at half the pixels, its weights drawn, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        numbers = NARROW.get(name, {})
        student = create_student(
            name, image_size, 64, neck="pyramid", neck_depth=1, input_size=image_size // 2, **numbers
        )
        # Biases of 0 leave norms nothing to normalise but rounding, and so do layer scales of 10⁻⁶; with those of 1,
        # activations grow until attention takes one cell alone, which the least rounding turns to another.
        for key, parameter in student.named_parameters():
            if parameter.ndim == 1:
                nn.init.uniform_(parameter, *((0.1, 0.5) if key.endswith("gamma") else (-0.3, 0.3)))
        return randomize_norms(student).eval().requires_grad_(False)


def with_large_sums(student: StudentEncoder, times: float) -> StudentEncoder:
    """Queries, keys and values so many times as large, in place; attention makes values as many times as large of them,
    which the projection behind it takes back: the embedding stays the same."""
    for module in student.modules():
        if isinstance(module, LiteMLA):
            module.qkv.conv.weight.data *= times
            module.proj.conv.weight.data /= times
    return student
