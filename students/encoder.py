"""Student image encoders: a timm backbone, and a neck that makes SAM's embedding of its stages.

RepViT (arXiv:2307.09283), as RepViT-SAM uses it (arXiv:2312.05760), and TinyViT (arXiv:2207.10666), as MobileSAM
uses it (arXiv:2306.14289). Both papers turn the stride of the last downsampling convolution from 2 to 1, so that
1024×1024 pixels become 64×64 cells, and end in the neck of SAM's own encoder (arXiv:2304.02643, appendix A).
EdgeSAM (arXiv:2312.06660, section 3.1) leaves that stride, and adds the last two stages up instead. EfficientViT-SAM
(arXiv:2402.05008, section 3) adds the last three, and looks at a quarter of the pixels.
"""

from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.repvit import RepVit
from timm.utils import reparameterize_model
from torch import nn

from students.backbones import build_backbone, is_known, list_students, strides, widths
from students.errors import InputError, first_line
from students.folding import fold_norms
from students.necks import PyramidNeck, Reduction, StageFusion, sam_neck

STRIDE = 16
"""Image pixels per embedding cell, along each side; what SAM's prompt encoder and decoder expect."""

DOWNSAMPLES = ("stride1", "fuse")
"""stride1: the last downsampling has stride 1. fuse: the last stage is at stride 32, and added to the one before."""

NECKS = ("sam", "pyramid")
"""sam: SAM's own, behind a last stage at stride 16. pyramid: EfficientViT-SAM's, of the last three stages."""

LARGEST_RATIO, DEEPEST_NECK = 16, 100
"""Of image_size to input_size, and of a pyramid; a stranger's file must not decide how much memory is asked for."""

PYRAMIDS = ([8, 16, 32], [16, 32, 64])
"""Strides of the last three stages that a pyramid is made of."""


@dataclass(frozen=True)
class StudentConfig:
    """All it takes to build a student again; stored beside its weights.

    `input_size` is the side at which the backbone works, None where that is `image_size`; `neck_depth` and
    `neck_expand` are of a pyramid's fused MBConvs.
    """

    name: str
    image_size: int = 1024
    embed_dim: int = 256
    overrides: dict[str, Any] = field(default_factory=dict)
    downsample: str = "stride1"
    neck: str = "sam"
    neck_depth: int = 4
    neck_expand: int = 1
    input_size: int | None = None

    @property
    def side(self) -> int:
        """Of the square that the backbone looks at, in pixels."""
        return self.image_size if self.input_size is None else self.input_size


class StudentEncoder(nn.Module):
    """A backbone and a neck; stands where `Sam.image_encoder` stands.

    `img_size` is the attribute that segment-anything reads off an encoder.
    """

    def __init__(self, backbone: nn.Module, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.img_size = config.image_size
        self.embed_dim = config.embed_dim
        ratio = config.image_size // config.side
        self.reduce = Reduction(ratio) if ratio > 1 else nn.Identity()
        self.backbone = backbone
        channels, out = widths(backbone), config.embed_dim
        self.register_load_state_dict_post_hook(_forget_biases)
        if config.neck == "pyramid":
            factors = [stride * ratio / STRIDE for stride in strides(backbone)[-3:]]
            self.neck: nn.Module = PyramidNeck(channels[-3:], factors, out, config.neck_depth, config.neck_expand)
        elif config.downsample == "fuse":
            self.fuse = StageFusion(channels[-2], channels[-1], out)
            self.neck = sam_neck(out, out)
        else:
            self.neck = sam_neck(channels[-1], out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised, padded images (B, 3, S, S) → image embeddings (B, embed_dim, S/16, S/16)."""
        return self.neck(*self.features(x))

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What the neck is given: of (B, 3, S, S) one map (B, C, S/16, S/16), or those of a pyramid's three stages."""
        x, backbone = self.reduce(x), cast(Any, self.backbone)
        if self.config.neck == "pyramid":
            return backbone.forward_intermediates(x, indices=3, intermediates_only=True)
        if self.config.downsample == "fuse":
            return [self.fuse(*backbone.forward_intermediates(x, indices=2, intermediates_only=True))]
        return [backbone.forward_features(x)]

    def native(self) -> "StudentEncoder":
        """A copy that takes images at the side at which its backbone works, (B, 3, input_size, input_size)."""
        native = deepcopy(self)
        native.reduce, native.img_size = nn.Identity(), self.config.side
        return native

    def fused(self) -> "StudentEncoder":
        """A copy for inference, in eval mode: parallel branches and batch norms folded into single convolutions.

        Structural re-parameterisation, as in RepViT (arXiv:2307.09283, section 3.1) and FastViT (arXiv:2303.14189,
        section 3.2); equal outputs up to rounding. Some of timm's models keep batch norms, which runtimes fold.
        """
        kept = next(self.parameters())
        _forget_biases(self)
        # timm folds in float32, and TinyViT's convolutions on the CPU.
        fused = deepcopy(self).to("meta" if kept.is_meta else "cpu", torch.float32).eval()
        fused.backbone = reparameterize_model(fused.backbone, inplace=True)
        fold_norms(fused)
        return fused.to(kept.device, kept.dtype)


def create_student(
    name: str,
    image_size: int = 1024,
    embed_dim: int = 256,
    pretrained: bool | str | Path = False,
    downsample: str = "stride1",
    neck: str = "sam",
    neck_depth: int = 4,
    neck_expand: int = 1,
    input_size: int | None = None,
    **overrides: Any,
) -> StudentEncoder:
    """Build a student encoder.

    Args:
        name: one of `list_students()`, or any other of timm's models whose stages fit.
        image_size: side S of the square input, in pixels; a multiple of 64.
        embed_dim: channels of the embedding, those of the teacher's (256 in every published SAM).
        pretrained: start the backbone from timm's ImageNet weights: True downloads them, or takes timm's cache; a path
            names a file with them (safetensors, or a state dict).
        downsample: how SAM's neck comes to stride 16, one of `DOWNSAMPLES`.
        neck: one of `NECKS`.
        neck_depth, neck_expand: how many fused MBConvs a pyramid has, and their expansion.
        input_size: side at which the backbone works; the encoder reduces the image to it. Default: `image_size`.
        overrides: the backbone's numbers to change: `widths` and `depths`, a value a stage, or any other argument
            of timm's model (`window_sizes`, `drop_path_rate`, ...).

    Returns:
        `StudentEncoder`: float32 (B, 3, S, S) normalised → float32 (B, embed_dim, S/16, S/16).

    Raises:
        InputError: unknown name, a backbone that the neck does not fit, sizes that do not divide, an override that the
            backbone does not know, or pretrained weights that cannot be had.
    """
    config = StudentConfig(
        name, image_size, embed_dim, overrides, downsample, neck, neck_depth, neck_expand, input_size
    )
    return build_encoder(config, pretrained)


def build_encoder(config: StudentConfig, pretrained: bool | str | Path = False) -> StudentEncoder:
    """`create_student` from a stored config."""
    if config.input_size == config.image_size:
        config = replace(config, input_size=None)
    _check_numbers(config)
    backbone: Any = build_backbone(config.name, config.overrides, 3 if config.neck == "pyramid" else 2, pretrained)
    if config.neck == "pyramid":
        _check_pyramid(backbone, config)
        return _tried(StudentEncoder(backbone, config))
    if strides(backbone)[-2:] != [STRIDE, 2 * STRIDE]:
        raise InputError(f"student {config.name!r} {_stages(backbone)}; neck=sam needs the last two at 16 and 32 px")
    if config.downsample == "stride1":
        _give_stride1(backbone, config.name)
    elif isinstance(backbone, RepVit):
        # The last block at stride 16, which timm counts among the next stage, is what EdgeSAM fuses.
        before, last = backbone.stages[-2:]
        before.blocks.append(last.downsample.pre_block)
        last.downsample.pre_block = nn.Identity()
    return _tried(StudentEncoder(backbone, config))


def _tried(student: StudentEncoder) -> StudentEncoder:
    """The student, unless its backbone is not one of the table and does not take such images."""
    config = student.config
    if config.name in list_students():
        return student
    cells = config.image_size // STRIDE
    image = torch.empty(1, 3, config.image_size, config.image_size, device="meta")
    try:
        with torch.no_grad():
            found = deepcopy(student).eval().to("meta")(image)
    except Exception as error:  # of whatever kind a stranger to the table raises
        raise InputError(f"student {config.name!r} does not take {config.side} px: {first_line(error)}") from error
    if found.shape != (1, config.embed_dim, cells, cells):
        raise InputError(f"student {config.name!r} makes {tuple(found.shape)} of {config.image_size} px")
    return student


def _check_numbers(config: StudentConfig) -> None:
    name, size, side = config.name, config.image_size, config.side
    if not is_known(name):
        near = get_close_matches(name, list_students(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "; list_students() has those that are known"
        raise InputError(f"unknown student {name!r}{hint}")
    for value, key, known in ((config.downsample, "downsample", DOWNSAMPLES), (config.neck, "neck", NECKS)):
        if value not in known:
            raise InputError(f"unknown {key} {value!r}; known: {', '.join(known)}")
    if size % 64 or size <= 0:
        raise InputError(f"image_size {size} of student {name!r} is not a multiple of 64")
    if side <= 0 or size % side or side % 32 or size // side > LARGEST_RATIO:
        raise InputError(
            f"input_size {side} of student {name!r} does not divide image_size {size}, is no multiple of 32, or is "
            f"less than 1/{LARGEST_RATIO} of it"
        )
    if config.neck == "sam" and side != size:
        raise InputError(f"input_size {side} of student {name!r} goes with neck=pyramid; neck=sam needs all {size} px")
    if config.neck == "pyramid" and config.downsample != "stride1":
        raise InputError(f"downsample={config.downsample} of student {name!r} goes with neck=sam, not pyramid")
    numbers = (config.neck_depth, config.neck_expand)
    if config.neck == "sam" and numbers != (StudentConfig.neck_depth, StudentConfig.neck_expand):
        raise InputError(f"neck_depth and neck_expand of student {name!r} go with neck=pyramid")
    if not 0 <= config.neck_depth <= DEEPEST_NECK or config.neck_expand < 1:
        raise InputError(
            f"neck_depth {config.neck_depth}, neck_expand {config.neck_expand} of student {name!r}: "
            f"0 to {DEEPEST_NECK}, and at least 1"
        )


def _check_pyramid(backbone: nn.Module, config: StudentConfig) -> None:
    last = strides(backbone)[-3:]
    if last not in PYRAMIDS:
        raise InputError(
            f"student {config.name!r} {_stages(backbone)}; neck=pyramid needs the last three at 8, 16, 32 or 16, 32, 64"
        )
    factors = [stride * config.image_size // config.side / STRIDE for stride in last]
    if any(factor != 0.5 and factor != int(factor) for factor in factors):
        raise InputError(
            f"input_size {config.side} of student {config.name!r} is a part of image_size {config.image_size} that its "
            f"stages at {', '.join(map(str, last))} px do not fit: all, 1/2, 1/4, ... do"
        )
    if config.side % last[-1]:
        raise InputError(f"student {config.name!r} has stages at {last} px, which do not divide {config.side} px")


def _stages(backbone: nn.Module) -> str:
    """What can be said of a backbone's stages, in an error."""
    found = strides(backbone)
    if len(set(found)) < 2:
        return "cannot be cut into stages"
    return f"has stages at {', '.join(map(str, found))} px"


def _give_stride1(backbone: Any, name: str) -> None:
    """Turn the stride of the one convolution with which the last stage begins from 2 to 1, in place."""
    last = backbone.get_submodule(backbone.feature_info[-1]["module"])
    found = [m for m in last.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    if len(found) != 1 or found[0].kernel_size == (2, 2):
        raise InputError(f"student {name!r} has no last downsampling that could have stride 1; neck=pyramid takes it")
    found[0].stride = (1, 1)


def config_dict(encoder: StudentEncoder) -> dict[str, Any]:
    """The encoder's config as plain data, for JSON."""
    return asdict(encoder.config)


def _forget_biases(student: nn.Module, *_: Any) -> None:
    """TinyViT keeps the attention biases that it last looked up; other weights have others."""
    for module in student.modules():
        if hasattr(module, "attention_bias_cache"):
            vars(module)["attention_bias_cache"] = {}
