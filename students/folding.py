"""Batch norms folded into the convolutions before them, for inference."""

from itertools import pairwise
from typing import Any

from timm.layers import ConvNormAct
from timm.models.efficientvit_mit import ConvNormAct as EfficientVitConvNormAct
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_norms(model: nn.Module) -> nn.Module:
    """Fold, in place, what timm's own `reparameterize_model` leaves: norms in its blocks of a convolution, a norm and
    an activation, and in sequences. The model is in eval mode."""
    for module in model.modules():
        part: Any = module
        if isinstance(module, EfficientVitConvNormAct) and isinstance(module.norm, nn.BatchNorm2d):
            part.conv, part.norm = fuse_conv_bn_eval(part.conv, part.norm), nn.Identity()
        elif isinstance(module, ConvNormAct) and isinstance(module.bn, nn.BatchNorm2d):
            part.conv, part.bn = fuse_conv_bn_eval(part.conv, part.bn), getattr(part.bn, "act", nn.Identity())
        elif type(module) is nn.Sequential:
            _fold_sequence(module)
    return model


def _fold_sequence(sequence: nn.Sequential) -> None:
    for (name, conv), (after, norm) in pairwise(list(sequence.named_children())):
        if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
            setattr(sequence, name, fuse_conv_bn_eval(conv, norm))
            setattr(sequence, after, nn.Identity())
