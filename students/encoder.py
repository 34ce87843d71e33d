"""Student image encoders: a timm backbone held at stride 16, and SAM's neck.

RepViT (arXiv:2307.09283), as RepViT-SAM uses it (arXiv:2312.05760), and TinyViT (arXiv:2207.10666), as MobileSAM
uses it (arXiv:2306.14289). Both papers turn the stride of the last downsampling convolution from 2 to 1, so that
1024×1024 pixels become 64×64 cells, and end in the neck of SAM's own encoder (arXiv:2304.02643, appendix A).
"""

import inspect
from dataclasses import asdict, dataclass, field
from typing import Any

import timm
import torch
from segment_anything.modeling.common import LayerNorm2d
from timm.models.repvit import RepVit
from timm.models.tiny_vit import TinyVit
from timm.utils import reparameterize_model
from torch import nn

from students.errors import InputError, first_line

STRIDE = 16
"""Image pixels per embedding cell, along each side; what SAM's prompt encoder and decoder expect."""

FAMILIES = {"repvit": RepVit, "tiny_vit": TinyVit}

NUMBERS = {
    "repvit": {"widths": "embed_dim", "depths": "depth"},
    "tiny_vit": {"widths": "embed_dims", "depths": "depths"},
}
"""What each timm family calls the numbers that a recipe changes most, under one name of ours."""

NOT_OURS = {"self", "num_classes", "in_chans", "global_pool", "distillation", "device", "dtype"}
"""Arguments of timm's models that a student leaves alone."""


@dataclass(frozen=True)
class StudentConfig:
    """All it takes to build a student again; stored beside its weights."""

    name: str
    image_size: int = 1024
    embed_dim: int = 256
    overrides: dict[str, Any] = field(default_factory=dict)


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
        channels, out = int(backbone.num_features), config.embed_dim  # type: ignore[arg-type]
        self.neck = nn.Sequential(
            nn.Conv2d(channels, out, kernel_size=1, bias=False),
            LayerNorm2d(out),
            nn.Conv2d(out, out, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised, padded images (B, 3, S, S) → image embeddings (B, embed_dim, S/16, S/16)."""
        return self.neck(self.backbone.forward_features(x))  # type: ignore[operator]

    def fused(self) -> "StudentEncoder":
        """A copy for inference, in eval mode: parallel branches and batch norms folded into single convolutions.

        RepViT's structural re-parameterisation (arXiv:2307.09283, section 3.1); equal outputs up to rounding.
        """
        copy = build_encoder(self.config)
        copy.load_state_dict(self.state_dict())
        copy.to(next(self.parameters()).device).eval()
        copy.backbone = reparameterize_model(copy.backbone, inplace=True)
        return copy


def list_students() -> list[str]:
    """Names that `create_student` takes: every timm `repvit_*` and `tiny_vit_*`, and `tiny_vit_5m` for `..._224`."""
    names = timm.list_models([f"{family}_*" for family in FAMILIES])
    return sorted({name.removesuffix("_224") for name in names} | set(names))


def create_student(
    name: str, image_size: int = 1024, embed_dim: int = 256, pretrained: bool = False, **overrides: Any
) -> StudentEncoder:
    """Build a student encoder.

    Args:
        name: one of `list_students()`.
        image_size: side S of the square input, in pixels; a multiple of 64.
        embed_dim: channels of the embedding, those of the teacher's (256 in every published SAM).
        pretrained: start the backbone from timm's ImageNet weights (downloaded, or from timm's cache).
        overrides: the backbone's numbers to change: `widths` and `depths`, a value a stage, or any other argument
            of timm's model (`window_sizes`, `drop_path_rate`, ...).

    Returns:
        `StudentEncoder`: float32 (B, 3, S, S) normalised → float32 (B, embed_dim, S/16, S/16).

    Raises:
        InputError: unknown name, an image size that does not fit, an override that the backbone does not know, or
            pretrained weights that cannot be had.
    """
    return build_encoder(StudentConfig(name, image_size, embed_dim, overrides), pretrained)


def build_encoder(config: StudentConfig, pretrained: bool = False) -> StudentEncoder:
    """`create_student` from a stored config."""
    known = list_students()
    if config.name not in known:
        raise InputError(f"unknown student {config.name!r}; known: {', '.join(known)}")
    if config.image_size % 64 or config.image_size <= 0:
        raise InputError(f"image_size {config.image_size} of student {config.name!r} is not a multiple of 64")
    return StudentEncoder(_stride16_backbone(config, pretrained), config)


def config_dict(encoder: StudentEncoder) -> dict[str, Any]:
    """The encoder's config as plain data, for JSON."""
    return asdict(encoder.config)


def _stride16_backbone(config: StudentConfig, pretrained: bool) -> nn.Module:
    timm_name = config.name if config.name in timm.list_models() else f"{config.name}_224"
    try:
        backbone = timm.create_model(timm_name, pretrained=pretrained, num_classes=0, **_timm_arguments(config))
    except OSError as error:
        if not pretrained:
            raise
        raise InputError(f"ImageNet weights of {timm_name!r} cannot be had: {first_line(error)}") from error
    except (TypeError, ValueError, AssertionError, IndexError, RuntimeError) as error:
        raise InputError(f"student {config.name!r} does not take these overrides: {first_line(error)}") from error
    if backbone.feature_info[-1]["reduction"] != 2 * STRIDE:
        raise InputError(f"student {config.name!r} needs four stages, not {len(backbone.stages)}")
    # The classifier is not used; TinyViT's keeps a norm even without classes, which DDP would report as unused.
    backbone.head = nn.Identity()
    last_stage = backbone.stages[-1].modules()
    (downsample,) = (m for m in last_stage if isinstance(m, nn.Conv2d) and m.stride == (2, 2))
    downsample.stride = (1, 1)
    return backbone


def _timm_arguments(config: StudentConfig) -> dict[str, Any]:
    """Overrides as timm's model takes them; only the model's own numbers, for they may come from a stranger's file."""
    family = next(family for family in FAMILIES if config.name.startswith(family))
    known = set(inspect.signature(FAMILIES[family]).parameters) - NOT_OURS
    arguments = {}
    for key, value in config.overrides.items():
        name = NUMBERS[family].get(key, key)
        if name not in known:
            ours = ", ".join(sorted(known - set(NUMBERS[family].values()) | set(NUMBERS[family])))
            raise InputError(f"student {config.name!r} has no {key!r} to override; it has {ours}")
        # timm's models take tuples; YAML and JSON give lists.
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return arguments
