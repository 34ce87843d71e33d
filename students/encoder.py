"""Student image encoders: a timm backbone held at stride 16, and SAM's neck.

RepViT (arXiv:2307.09283), as RepViT-SAM uses it (arXiv:2312.05760), and TinyViT (arXiv:2207.10666), as MobileSAM
uses it (arXiv:2306.14289). Both papers turn the stride of the last downsampling convolution from 2 to 1, so that
1024×1024 pixels become 64×64 cells, and end in the neck of SAM's own encoder (arXiv:2304.02643, appendix A).
EdgeSAM (arXiv:2312.06660, section 3.1) leaves that stride, and adds the last two stages up instead.
"""

import inspect
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from segment_anything.modeling.common import LayerNorm2d
from timm.models.repvit import RepVit
from timm.models.tiny_vit import TinyVit
from timm.utils import reparameterize_model
from torch import nn

from students.errors import InputError, first_line
from students.imagenet import load_from_file, refuse_without_network

STRIDE = 16
"""Image pixels per embedding cell, along each side; what SAM's prompt encoder and decoder expect."""

DOWNSAMPLES = ("stride1", "fuse")
"""stride1: the last downsampling has stride 1. fuse: the last stage is at stride 32, and added to the one before."""


@dataclass(frozen=True)
class Family:
    """Backbones of one timm class: what it calls its stem, and the numbers that a recipe changes most."""

    model: type[nn.Module]
    stem: str
    widths: str
    depths: str


FAMILIES = {
    "repvit": Family(RepVit, stem="stem", widths="embed_dim", depths="depth"),
    "tiny_vit": Family(TinyVit, stem="patch_embed", widths="embed_dims", depths="depths"),
}
"""By what their names begin with."""

NOT_OURS = {"self", "num_classes", "in_chans", "global_pool", "distillation", "device", "dtype"}
"""Arguments of timm's models that a student leaves alone."""


@dataclass(frozen=True)
class StudentConfig:
    """All it takes to build a student again; stored beside its weights."""

    name: str
    image_size: int = 1024
    embed_dim: int = 256
    overrides: dict[str, Any] = field(default_factory=dict)
    downsample: str = "stride1"


class StudentEncoder(nn.Module):
    """A stride-16 backbone and SAM's neck; stands where `Sam.image_encoder` stands.

    `img_size` is the attribute that segment-anything reads off an encoder.
    """

    def __init__(self, backbone: nn.Module, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.img_size = config.image_size
        self.embed_dim = config.embed_dim
        self.backbone = backbone
        middle, last = (info["num_chs"] for info in backbone.feature_info[-2:])  # type: ignore[index]
        channels, out = last, config.embed_dim
        if config.downsample == "fuse":
            channels = out
            self.fuse = StageFusion(middle, last, out)
        self.register_load_state_dict_post_hook(_forget_biases)
        self.neck = nn.Sequential(
            nn.Conv2d(channels, out, kernel_size=1, bias=False),
            LayerNorm2d(out),
            nn.Conv2d(out, out, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised, padded images (B, 3, S, S) → image embeddings (B, embed_dim, S/16, S/16)."""
        return self.neck(self.features(x))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What the neck is given: (B, 3, S, S) → (B, C, S/16, S/16)."""
        if self.config.downsample == "stride1":
            return self.backbone.forward_features(x)  # type: ignore[operator]
        stages: Any = self.backbone.stages
        x = getattr(self.backbone, _family(self.config.name).stem)(x)
        for stage in stages[:-1]:
            x = stage(x)
        return self.fuse(x, stages[-1](x))

    def fused(self) -> "StudentEncoder":
        """A copy for inference, in eval mode: parallel branches and batch norms folded into single convolutions.

        RepViT's structural re-parameterisation (arXiv:2307.09283, section 3.1); equal outputs up to rounding.
        """
        kept = next(self.parameters())
        _forget_biases(self)
        # timm folds in float32, and TinyViT's convolutions on the CPU.
        fused = deepcopy(self).to("meta" if kept.is_meta else "cpu", torch.float32).eval()
        fused.backbone = reparameterize_model(fused.backbone, inplace=True)
        return fused.to(kept.device, kept.dtype)


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


def list_students() -> list[str]:
    """Names that `create_student` takes: every timm `repvit_*` and `tiny_vit_*`, and `tiny_vit_5m` for `..._224`."""
    names = timm.list_models([f"{family}_*" for family in FAMILIES])
    return sorted({name.removesuffix("_224") for name in names} | set(names))


def create_student(
    name: str,
    image_size: int = 1024,
    embed_dim: int = 256,
    pretrained: bool | str | Path = False,
    downsample: str = "stride1",
    **overrides: Any,
) -> StudentEncoder:
    """Build a student encoder.

    Args:
        name: one of `list_students()`.
        image_size: side S of the square input, in pixels; a multiple of 64.
        embed_dim: channels of the embedding, those of the teacher's (256 in every published SAM).
        pretrained: start the backbone from timm's ImageNet weights: True downloads them, or takes timm's cache; a path
            names a file with them (safetensors, or a state dict).
        downsample: how the embedding comes to stride 16, one of `DOWNSAMPLES`.
        overrides: the backbone's numbers to change: `widths` and `depths`, a value a stage, or any other argument
            of timm's model (`window_sizes`, `drop_path_rate`, ...).

    Returns:
        `StudentEncoder`: float32 (B, 3, S, S) normalised → float32 (B, embed_dim, S/16, S/16).

    Raises:
        InputError: unknown name, an image size that does not fit, an override that the backbone does not know, or
            pretrained weights that cannot be had.
    """
    return build_encoder(StudentConfig(name, image_size, embed_dim, overrides, downsample), pretrained)


def build_encoder(config: StudentConfig, pretrained: bool | str | Path = False) -> StudentEncoder:
    """`create_student` from a stored config."""
    known = list_students()
    if config.name not in known:
        raise InputError(f"unknown student {config.name!r}; known: {', '.join(known)}")
    if config.image_size % 64 or config.image_size <= 0:
        raise InputError(f"image_size {config.image_size} of student {config.name!r} is not a multiple of 64")
    if config.downsample not in DOWNSAMPLES:
        raise InputError(f"unknown downsample {config.downsample!r}; known: {', '.join(DOWNSAMPLES)}")
    return StudentEncoder(_backbone(config, pretrained), config)


def config_dict(encoder: StudentEncoder) -> dict[str, Any]:
    """The encoder's config as plain data, for JSON."""
    return asdict(encoder.config)


def _backbone(config: StudentConfig, pretrained: bool | str | Path) -> nn.Module:
    timm_name = config.name if config.name in timm.list_models() else f"{config.name}_224"
    downloaded = pretrained is True
    if downloaded:
        refuse_without_network(timm_name)
    try:
        backbone = timm.create_model(timm_name, pretrained=downloaded, num_classes=0, **_timm_arguments(config))
    except OSError as error:
        if not downloaded:
            raise
        raise InputError(f"ImageNet weights of {timm_name!r} cannot be had: {first_line(error)}") from error
    except (TypeError, ValueError, AssertionError, IndexError, RuntimeError) as error:
        raise InputError(f"student {config.name!r} does not take these overrides: {first_line(error)}") from error
    if not isinstance(pretrained, bool):
        load_from_file(backbone, Path(pretrained), timm_name)
    if backbone.feature_info[-1]["reduction"] != 2 * STRIDE:
        raise InputError(f"student {config.name!r} needs four stages, not {len(backbone.stages)}")
    # The classifier is not used; TinyViT's keeps a norm even without classes, which DDP would report as unused.
    backbone.head = nn.Identity()
    before, last = backbone.stages[-2:]
    if config.downsample == "stride1":
        (downsample,) = (m for m in last.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2))
        downsample.stride = (1, 1)
    elif isinstance(backbone, RepVit):
        # The last block at stride 16, which timm counts among the next stage, is what EdgeSAM fuses.
        before.blocks.append(last.downsample.pre_block)
        last.downsample.pre_block = nn.Identity()
    return backbone


def _timm_arguments(config: StudentConfig) -> dict[str, Any]:
    """Overrides as timm's model takes them; only the model's own numbers, for they may come from a stranger's file."""
    family = _family(config.name)
    numbers = {"widths": family.widths, "depths": family.depths}
    known = set(inspect.signature(family.model).parameters) - NOT_OURS
    arguments = {}
    for key, value in config.overrides.items():
        name = numbers.get(key, key)
        if name not in known:
            ours = ", ".join(sorted(known - set(numbers.values()) | set(numbers)))
            raise InputError(f"student {config.name!r} has no {key!r} to override; it has {ours}")
        # timm's models take tuples; YAML and JSON give lists.
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return arguments


def _forget_biases(student: nn.Module, *_: Any) -> None:
    """TinyViT keeps the attention biases that it last looked up; other weights have others."""
    for module in student.modules():
        if hasattr(module, "attention_bias_cache"):
            vars(module)["attention_bias_cache"] = {}


def _family(name: str) -> Family:
    return next(family for start, family in FAMILIES.items() if name.startswith(start))
