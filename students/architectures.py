"""Which SAM a state dict is: told by the names and shapes of its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import nn

from students.encoder import DOWNSAMPLES, StudentConfig, build_encoder, list_students
from students.errors import InputError
from students.layouts import PREFIX, published_names, unused_shapes
from students.sam import untrained_sam
from students.state_dicts import Shapes, differences, name_some, shapes_of

VITS = ("vit_h", "vit_l", "vit_b")
PUBLISHED = {
    "mobile_sam": StudentConfig("tiny_vit_5m"),
    "repvit_sam": StudentConfig("repvit_m2_3"),
    "edge_sam": StudentConfig("repvit_m1", downsample="fuse"),
}
"""Students that their authors have released, and the names that their checkpoints go by."""


@dataclass(frozen=True)
class Architecture:
    """An image encoder, and how checkpoints name it.

    Attributes:
        build: makes the encoder, with weights that are drawn.
        names: the encoder's name of each tensor → the checkpoint's; shapes: of all that a checkpoint has of it.
    """

    build: Callable[[], nn.Module]
    names: Mapping[str, str]
    shapes: Shapes


def architecture_name(config: StudentConfig) -> str:
    """What a student at 1024 px goes by: its publisher's name where there is one, or its own."""
    config = replace(config, name=config.name.removesuffix("_224"))  # which is a second name
    own = config.name + ("-fuse" if config.downsample == "fuse" else "")
    return next((name for name, published in PUBLISHED.items() if published == config), own)


def known_architectures() -> list[str]:
    """segment-anything's encoders, the published students, and every other size of theirs."""
    return [*VITS, *_students()]


@cache
def architecture(name: str) -> Architecture:
    """One of `known_architectures`."""
    if name in VITS:
        with torch.device("meta"):
            encoder = sam_model_registry[name]().image_encoder
        names = {key: PREFIX + key for key in encoder.state_dict()}
        return Architecture(lambda: sam_model_registry[name]().image_encoder, names, _renamed_shapes(encoder, names))
    config = _students()[name]
    with torch.random.fork_rng(devices=[]):  # its weights are drawn for nothing; some timm cannot leave them out
        student = build_encoder(config)
    names = published_names(student)
    shapes = {**_renamed_shapes(student, names), **unused_shapes(student)}
    return Architecture(partial(build_encoder, config), names, shapes)


@cache
def _students() -> dict[str, StudentConfig]:
    return {architecture_name(config): config for config in (*PUBLISHED.values(), *every_student())}


def every_student() -> list[StudentConfig]:
    """Every size and way of downsampling, at 1024 px."""
    names = [name for name in list_students() if not name.endswith("_224")]
    return [StudentConfig(name, downsample=way) for name in names for way in DOWNSAMPLES]


def recognise(shapes: Shapes, origin: str) -> tuple[str, bool]:
    """The architecture whose tensors these are, and whether prompt encoder and mask decoder are among them.

    Raises:
        InputError: it is none; names what is missing, surplus or of another shape in the one that it looks most like.
    """
    decoder = _decoder_shapes()
    beside = {name: shape for name, shape in shapes.items() if not name.startswith(PREFIX)}
    encoder = {name: shape for name, shape in shapes.items() if name.startswith(PREFIX)}
    for name in known_architectures():
        if architecture(name).shapes == encoder:
            if beside in ({}, decoder):
                return name, bool(beside)
            raise InputError(_unlike(name, {**encoder, **decoder}, shapes, origin))
    name, expected = max(
        ((name, {**architecture(name).shapes, **decoder}) for name in known_architectures()),
        key=lambda item: sum(shapes.get(key) == shape for key, shape in item[1].items()) / len(item[1].keys() | shapes),
    )
    raise InputError(_unlike(name, expected, shapes, origin))


def _unlike(name: str, expected: Shapes, found: Shapes, origin: str) -> str:
    if not expected.keys() & found:
        return f"{origin} holds no SAM that is known: {name_some(sorted(found), 'tensors')}"
    return f"{origin} looks most like {name}, but: {differences(expected, found)}"


def _renamed_shapes(encoder: nn.Module, names: Mapping[str, str]) -> Shapes:
    return {names[key]: shape for key, shape in shapes_of(encoder.state_dict()).items()}


@cache
def _decoder_shapes() -> Shapes:
    with torch.device("meta"):
        sam: Sam = untrained_sam(nn.Identity())
    return shapes_of(sam.state_dict())
