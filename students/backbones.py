"""Backbones by name: any of timm's that can be cut into stages, and EfficientViT-SAM's sizes, which timm has not.

A backbone is a timm model without its classifier, with timm's feature interface: `feature_info` says at which strides
its stages lie, and `forward_intermediates` gives their outputs.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.efficientvit_mit import EfficientVitLarge, LiteMLA
from torch import nn

from students.depthwise import scale_channels
from students.efficientvit import NORM_EPS, efficientvit_xl
from students.errors import InputError, first_line
from students.imagenet import load_from_file, refuse_without_network, repository_of

FAMILIES = (
    "repvit_*", "tiny_vit_*", "efficientvit_b*", "efficientvit_l*", "fastvit_t*", "fastvit_s*",
    "mobilenetv4_conv_small", "mobilenetv4_conv_medium", "mobilenetv4_conv_large", "mobilenetv4_hybrid_medium",
    "mobilenetv4_hybrid_large", "convnext_atto", "convnext_pico", "convnext_nano", "convnext_tiny", "convnextv2_atto",
    "convnextv2_nano", "convnextv2_tiny", "ghostnetv3_*",
)  # fmt: skip
"""timm's models among `list_students`. Others are taken where they can be cut into stages."""


@dataclass(frozen=True)
class Own:
    """A backbone that timm has not: how it is built, with these numbers."""

    build: Callable[..., nn.Module]
    numbers: Mapping[str, Any] = field(default_factory=dict)


OWN = {
    "efficientvit_l0": Own(
        EfficientVitLarge,
        {"widths": (32, 64, 128, 256, 512), "depths": (1, 1, 1, 4, 4), "head_widths": (1, 1), "num_classes": 0},
    ),
    "efficientvit_xl0": Own(efficientvit_xl, {"depths": (0, 1, 1, 2, 3, 3)}),
    "efficientvit_xl1": Own(efficientvit_xl, {"depths": (1, 2, 2, 4, 6, 6)}),
}
"""EfficientViT-SAM's (arXiv:2402.05008, section 3; depths as released)."""

NUMBERS = {"widths": ("widths", "embed_dims", "embed_dim", "dims"), "depths": ("depths", "depth", "layers")}
"""What timm's models call the numbers that a recipe changes most."""

NOT_OURS = {"self", "num_classes", "in_chans", "global_pool", "distillation", "device", "dtype", "head_widths"}
"""Arguments of timm's models that a student leaves alone."""


def list_students() -> list[str]:
    """The students of the table: timm's models of `FAMILIES`, of each of which some are tested, `OWN`, and
    `tiny_vit_5m` for `..._224`.

    `create_student` also takes timm's other models, where they can be cut into stages.
    """
    return list(_listed())


@cache
def _listed() -> tuple[str, ...]:
    names = timm.list_models(FAMILIES)
    short = {name.removesuffix("_224") for name in names if name.startswith("tiny_vit")}
    return tuple(sorted({*names, *short, *OWN}))


def is_known(name: str) -> bool:
    """Whether a name is one that `create_student` may take; names of weights (`NAME.TAG`) are not."""
    return name in OWN or ("." not in name and timm.is_model(_timm_name(name)))


def check_pretrained(name: str) -> None:
    """Raise `InputError` where timm has no ImageNet weights of a name; asks nobody."""
    repository_of(_timm_name(name))


def build_backbone(
    name: str, overrides: Mapping[str, Any], stages: int, pretrained: bool | str | Path = False
) -> nn.Module:
    """A timm model without what lies behind its last stage, which DDP would report as unused.

    Args:
        name: for which `is_known`.
        overrides: its numbers to change: `widths` and `depths`, or any other argument of the model.
        stages: the last so many stages' outputs are asked for.
        pretrained: ImageNet weights: True downloads them, or takes timm's cache; a path names a file with them.

    Raises:
        InputError: overrides that the model does not take, weights that cannot be had.
    """
    downloaded = pretrained is True
    if downloaded:
        refuse_without_network(_timm_name(name))
    try:
        backbone = _model(name, downloaded, **_arguments(name, overrides))
        if len(strides(backbone)) >= stages:
            _cut(backbone, stages)
    except InputError:
        raise
    except OSError as error:
        if not downloaded:
            raise
        raise InputError(f"ImageNet weights of {name!r} cannot be had: {first_line(error)}") from error
    except Exception as error:  # timm's models raise of many kinds where numbers do not go together
        what = "does not take these overrides" if overrides else "cannot be built"
        raise InputError(f"student {name!r} {what}: {first_line(error)}") from error
    if not isinstance(pretrained, bool):
        load_from_file(backbone, Path(pretrained), _timm_name(name), _whole_names(name))
    return backbone


def _cut(backbone: nn.Module, stages: int) -> None:
    """Leave out, in place, what lies behind the last stage, also what timm before 1.0.31 does not prune itself."""
    with suppress(AssertionError):  # it cannot prune EfficientViT, whose head is all that there is to leave out
        backbone.prune_intermediate_layers(stages, prune_norm=True, prune_head=True)  # type: ignore[operator]
    info: Any = backbone.feature_info
    in_stages = {stage["module"].partition(".")[0] for stage in info}
    for name in ("head", "final_conv", "conv_head"):
        if name not in in_stages and isinstance(getattr(backbone, name, None), nn.Module):
            setattr(backbone, name, nn.Identity())


def strides(backbone: nn.Module) -> list[int]:
    """Pixels a cell of each stage, along each side; empty where the model has no stages that timm knows of."""
    info: Any = getattr(backbone, "feature_info", None)
    if not info or not hasattr(backbone, "prune_intermediate_layers"):
        return []
    return [int(stage["reduction"]) for stage in info]


def widths(backbone: nn.Module) -> list[int]:
    """Channels of each stage."""
    info: Any = backbone.feature_info
    return [int(stage["num_chs"]) for stage in info]


def _model(name: str, pretrained: bool = False, **numbers: Any) -> nn.Module:
    if name.startswith("efficientvit_l"):
        numbers = {"norm_eps": NORM_EPS, **numbers}
    if name in OWN:
        model = OWN[name].build(**{**OWN[name].numbers, **numbers})
    else:
        model = timm.create_model(_timm_name(name), pretrained=pretrained, num_classes=0, **numbers)
    for module in model.modules():
        if isinstance(module, LiteMLA):
            module.eps = 1e-15  # its authors'; timm's 1e-5 is for half precision
    scale_channels(model)
    return model


def _timm_name(name: str) -> str:
    return f"{name}_224" if name.startswith("tiny_vit") and not timm.is_model(name) else name


@cache
def _known_arguments(name: str) -> frozenset[str]:
    build: Any = OWN[name].build if name in OWN else type(_whole(name))
    return frozenset(inspect.signature(build).parameters) - NOT_OURS


def _whole_names(name: str) -> set[str]:
    """Names of all tensors of a model, its classifier's among them."""
    return set() if name in OWN else set(_whole(name).state_dict())


def _whole(name: str) -> nn.Module:
    """A timm model as it comes, without memory for its weights."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return timm.create_model(_timm_name(name))


def _arguments(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides as timm's model takes them; only the model's own numbers, for they may come from a stranger's file."""
    if not overrides:
        return {}
    known = _known_arguments(name)
    theirs = {ours: found for ours, names in NUMBERS.items() if (found := next((n for n in names if n in known), None))}
    arguments = {}
    for key, value in overrides.items():
        argument = theirs.get(key, key)
        if argument not in known:
            ours = ", ".join(sorted(known - set(theirs.values()) | set(theirs)))
            raise InputError(f"student {name!r} has no {key!r} to override; it has {ours}")
        # timm's models take tuples; YAML and JSON give lists.
        arguments[argument] = tuple(value) if isinstance(value, list) else value
    return arguments
