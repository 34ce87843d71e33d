"""What published students call their weights: MobileSAM's TinyViT, the RepViT of RepViT-SAM and EdgeSAM, and
EfficientViT-SAM's.

timm's models compute what their authors' code computes, under other names. In RepViT's code all blocks stand in one
list, `features`, downsampling ones among them; what timm calls a downsampling's `pre_block` is the block before it.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from students.encoder import StudentEncoder

PREFIX = "image_encoder."

TINY_VIT = (
    (r"^backbone\.patch_embed\.conv1\.", "patch_embed.seq.0."),
    (r"^backbone\.patch_embed\.conv2\.", "patch_embed.seq.2."),
    (r"^backbone\.stages\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) - 1}.downsample."),
    (r"^backbone\.stages\.", "layers."),
    (r"\.conv\.", ".c."),
)
REPVIT = (
    (r"^backbone\.stem\.conv1\.", "features.0.0."),
    (r"^backbone\.stem\.conv2\.", "features.0.2."),
    (r"\.spatial_downsample\.", ".token_mixer.0."),
    (r"\.channel_downsample\.", ".token_mixer.2."),
    (r"\.se\.", ".token_mixer.1."),
    (r"\.token_mixer\.(conv|conv1|bn)\.", r".token_mixer.0.\1."),
    (r"\.(?:channel_mixer|ffn)\.conv1\.", ".channel_mixer.m.0."),
    (r"\.(?:channel_mixer|ffn)\.conv2\.", ".channel_mixer.m.2."),
    (r"^fuse\.middle\.", "fuse_stage2."),
    (r"^fuse\.last\.", "fuse_stage3.op_list.0."),
)
EFFICIENTVIT = (
    (r"^backbone\.stem\.in_conv\.", "backbone.stages.0.op_list.0."),
    (r"^backbone\.stem\.res(\d+)\.", lambda found: f"backbone.stages.0.op_list.{int(found[1]) + 1}."),
    (
        r"^backbone\.stages\.(\d+)\.blocks\.(\d+)\.",
        lambda found: f"backbone.stages.{int(found[1]) + 1}.op_list.{found[2]}.",
    ),
    (r"^neck\.inputs\.(\d+)\.", lambda found: f"neck.input_ops.{2 - int(found[1])}.op_list.0."),  # coarsest first
    (r"^neck\.blocks\.", "neck.middle.op_list."),
    (r"^neck\.out\.", "neck.output_ops.0.op_list.0.conv."),
    (r"^neck\.norm\.", "norm."),
)
IMAGENET_CLASSES = 1000


def published_names(student: StudentEncoder) -> dict[str, str]:
    """Our name of every tensor in a student's state dict → its name in the published layout of its family."""
    stages: Any = student.backbone.get_submodule("stages")
    for family, renamings in (("tiny_vit", TINY_VIT), ("efficientvit", EFFICIENTVIT)):
        if student.config.name.startswith(family):
            return {ours: PREFIX + _renamed(ours, renamings) for ours in student.state_dict()}
    starts = [1]
    for stage, after in pairwise(stages):
        before_downsampling = not isinstance(after.downsample.pre_block, nn.Identity)
        starts.append(starts[-1] + len(stage.blocks) + before_downsampling + 1)
    return {ours: PREFIX + _renamed(_listed(ours, starts), REPVIT) for ours in student.state_dict()}


def unused_shapes(student: StudentEncoder) -> dict[str, tuple[int, ...]]:
    """What a published layout has beside: MobileSAM keeps TinyViT's classifier, which no embedding passes through."""
    if not student.config.name.startswith("tiny_vit"):
        return {}
    channels = int(student.backbone.num_features)  # type: ignore[arg-type]
    classifier = {"head.weight": (IMAGENET_CLASSES, channels), "head.bias": (IMAGENET_CLASSES,)}
    norm: dict[str, tuple[int, ...]] = {"norm_head.weight": (channels,), "norm_head.bias": (channels,)}
    return {PREFIX + name: shape for name, shape in {**norm, **classifier}.items()}


def _listed(name: str, starts: Sequence[int]) -> str:
    """A block of a stage, by its place in RepViT's list."""
    found = re.match(r"backbone\.stages\.(\d+)\.(?:blocks\.(\d+)|downsample\.(pre_block)|downsample)\.", name)
    if found is None:
        return name
    start, rest = starts[int(found[1])], name[found.end() :]
    if found[2] is not None:
        return f"features.{start + int(found[2])}.{rest}"
    return f"features.{start - (2 if found[3] else 1)}.{rest}"


def _renamed(name: str, renamings: Sequence[tuple]) -> str:
    for pattern, replacement in renamings:
        name = re.sub(pattern, replacement, name)
    return name
