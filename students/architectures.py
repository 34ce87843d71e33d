"""Which SAM a state dict is: told by the names and shapes of its tensors."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import nn

from students.backbones import is_known, list_students
from students.encoder import DOWNSAMPLES, STRIDE, StudentConfig, build_encoder
from students.errors import InputError
from students.layouts import PREFIX, published_names, unused_shapes
from students.sam import untrained_sam
from students.state_dicts import Shapes, differences, name_some, shapes_of

VITS = ("vit_h", "vit_l", "vit_b")
PUBLISHED = {
    "mobile_sam": StudentConfig("tiny_vit_5m"),
    "repvit_sam": StudentConfig("repvit_m2_3"),
    "edge_sam": StudentConfig("repvit_m1", downsample="fuse"),
    "efficientvit_sam_l0": StudentConfig("efficientvit_l0", neck="pyramid", neck_depth=4, input_size=512),
    "efficientvit_sam_l1": StudentConfig("efficientvit_l1", neck="pyramid", neck_depth=8, input_size=512),
    "efficientvit_sam_l2": StudentConfig("efficientvit_l2", neck="pyramid", neck_depth=12, input_size=512),
    "efficientvit_sam_xl0": StudentConfig("efficientvit_xl0", neck="pyramid", neck_depth=6, neck_expand=4),
    "efficientvit_sam_xl1": StudentConfig("efficientvit_xl1", neck="pyramid", neck_depth=12, neck_expand=4),
}
"""Students that their authors have released, and the names that their checkpoints go by."""

SAM_IMAGE_SIZE = 1024
"""Of everything that was published; fine-tuned ViTs keep positions for other sizes."""

LARGEST_IMAGE_SIZE = 4096
"""A file's word for its size is taken up to here; a stranger's must not decide how much memory is asked for."""

PARTS = ("prompt_encoder.", "mask_decoder.")

LORA = re.compile(r"(^|[._])(lora|linear_[ab]_[qkv]|w_[ab]_?\d+|w_[ab]s)([._]|$)", re.IGNORECASE)
"""What LoRA's pairs are called by PEFT and loralib, and by SAMed and what followed it."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        name: of `known_architectures`, or `student`, which is one of ours.
        image_size: side of the square input in pixels.
        has_decoder: whether prompt encoder and mask decoder are there, and nothing that changes what they do.
        left_out: where they are not, what the file has that is not used, and why; "" where it has nothing.
    """

    name: str
    image_size: int
    has_decoder: bool
    left_out: str = ""


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
    """What a student at 1024 px goes by: its publisher's name where there is one, or its own, with its way to the
    embedding: `repvit_m1-fuse`, `repvit_m1_1-pyramid`, `repvit_m1_1-pyramid-512` of 512 px."""
    config = replace(config, name=config.name.removesuffix("_224"))  # which is a second name
    own = config.name + ("-fuse" if config.downsample == "fuse" else "-pyramid" if config.neck == "pyramid" else "")
    own += f"-{config.input_size}" if config.input_size else ""
    return next((name for name, published in PUBLISHED.items() if published == config), own)


def published_name(config: StudentConfig) -> str | None:
    """What a student goes by for whose numbers there is a published layout; None where there is none."""
    name = architecture_name(config)
    known = _students().get(name)
    return name if known == replace(config, name=config.name.removesuffix("_224")) else None


def config_by_name(name: str, image_size: int = SAM_IMAGE_SIZE) -> StudentConfig:
    """The student that goes by a name of `architecture_name`'s form; at another image size its backbone looks at as
    large a part of the pixels.

    Raises:
        InputError: the name's backbone is not known.
    """
    config = PUBLISHED.get(name) or _config_in(name)
    if config.input_size is not None:
        config = replace(config, input_size=config.input_size * image_size // SAM_IMAGE_SIZE)
    return replace(config, image_size=image_size)


def _config_in(name: str) -> StudentConfig:
    found = re.fullmatch(r"(?P<name>.+?)(?:-(?P<way>fuse|pyramid(?:-(?P<side>\d+))?))?", name)
    if found is None or not is_known(found["name"]):
        raise InputError(f"unknown student {name!r}")
    if found["way"] is None or found["way"] == "fuse":
        return StudentConfig(found["name"], downsample=found["way"] or "stride1")
    return StudentConfig(found["name"], neck="pyramid", input_size=int(found["side"]) if found["side"] else None)


def known_architectures() -> list[str]:
    """segment-anything's encoders, the published students, and every other size of theirs."""
    return [*VITS, *_students()]


@cache
def architecture(name: str, image_size: int = SAM_IMAGE_SIZE) -> Architecture:
    """One of `known_architectures`; of segment-anything's, with positions for an image size."""
    if name in VITS:
        with torch.device("meta"):
            encoder = vit_encoder(name, image_size)
        names = {key: PREFIX + key for key in encoder.state_dict()}
        return Architecture(partial(vit_encoder, name, image_size), names, _renamed_shapes(encoder, names))
    config = _students()[name]
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        student = build_encoder(config)
    names = published_names(student)
    shapes = {**_renamed_shapes(student, names), **unused_shapes(student)}
    return Architecture(partial(build_encoder, config), names, shapes)


def vit_encoder(name: str, image_size: int) -> nn.Module:
    """One of segment-anything's encoders, its tables of positions as large as an image size needs them."""
    encoder = sam_model_registry[name]().image_encoder
    if image_size != encoder.img_size:
        cells = image_size // STRIDE
        encoder.img_size = image_size
        encoder.pos_embed = nn.Parameter(torch.zeros(1, cells, cells, encoder.pos_embed.shape[-1]))
        for attention in (block.attn for block in encoder.blocks if not block.window_size):
            for table in ("rel_pos_h", "rel_pos_w"):
                channels = getattr(attention, table).shape[-1]
                setattr(attention, table, nn.Parameter(torch.zeros(2 * cells - 1, channels)))
    return encoder


@cache
def _students() -> dict[str, StudentConfig]:
    return {architecture_name(config): config for config in (*PUBLISHED.values(), *other_sizes())}


def other_sizes() -> list[StudentConfig]:
    """Every size of the backbones that published layouts have SAM's neck behind, in each way of downsampling."""
    names = [name for name in list_students() if name.startswith(("repvit", "tiny_vit")) and not name.endswith("_224")]
    return [StudentConfig(name, downsample=way) for name in names for way in DOWNSAMPLES]


def recognise(shapes: Shapes, origin: str) -> Contents:
    """What holds these tensors, by segment-anything's names or a published layout's.

    An encoder that is whole is taken whatever stands beside it; prompt encoder and mask decoder only where nothing was
    added that may change what they do.

    Raises:
        InputError: no encoder that is known; names what is missing, surplus or of another shape in the one that it
            looks most like. LoRA's pairs, whose sum with the weights is what was trained. A decoder cut short.
    """
    if pairs := sorted(name for name in shapes if LORA.search(name)):
        raise InputError(
            f"{origin} holds LoRA's pairs, {name_some(pairs, 'tensors')}: merge them into the weights that they are "
            "added to (PEFT: merge_and_unload), and save those"
        )
    beside = {name: shape for name, shape in shapes.items() if not name.startswith(PREFIX)}
    encoder = {name: shape for name, shape in shapes.items() if name.startswith(PREFIX)}
    if not encoder:
        raise InputError(f"{origin} holds no SAM that is known: {name_some(sorted(shapes), 'tensors')}")
    decoder = _decoder_shapes() if beside else {}
    for name, image_size, expected in _candidates(encoder):
        if expected == encoder:
            if _cut_short(beside):
                raise InputError(_unlike(name, {**encoder, **decoder}, shapes, origin))
            return Contents(name, image_size, bool(beside) and beside == decoder, _not_used(beside))
    name, expected = max(
        ((name, expected) for name, _, expected in _candidates(encoder)),
        key=lambda item: _alike({**item[1], **decoder}, shapes),
    )
    if expected.items() < encoder.items():
        added = name_some(sorted(encoder.keys() - expected), "tensors")
        raise InputError(f"{origin} is a {name} with {added} added to its encoder, which change what it computes")
    raise InputError(_unlike(name, {**expected, **decoder}, shapes, origin))


def _alike(expected: Shapes, found: Shapes) -> float:
    """The share of all tensors that both have."""
    return sum(found.get(name) == shape for name, shape in expected.items()) / len(expected.keys() | found)


def _candidates(encoder: Shapes) -> Iterator[tuple[str, int, Shapes]]:
    """Name, image size and shapes of every architecture that an encoder could be; to build them all takes a while."""
    is_vit = any(name.startswith(f"{PREFIX}blocks.") for name in encoder)
    is_efficientvit = any(name.startswith(f"{PREFIX}backbone.") for name in encoder)
    students = [name for name in _students() if name.startswith("efficientvit") == is_efficientvit]
    for name in VITS if is_vit else students:
        image_size = _vit_image_size(encoder) if name in VITS else SAM_IMAGE_SIZE
        yield name, image_size, architecture(name, image_size).shapes


def _vit_image_size(encoder: Shapes) -> int:
    """What a ViT's absolute positions are for; 1024 px where they are for no size that is taken."""
    positions = encoder.get(f"{PREFIX}pos_embed", ())
    if len(positions) == 4 and positions[1] == positions[2]:
        size = positions[1] * STRIDE
        if 0 < size <= LARGEST_IMAGE_SIZE and size % 64 == 0:
            return size
    return SAM_IMAGE_SIZE


def _cut_short(beside: Shapes) -> bool:
    """Whether what stands beside an encoder is SAM's own, but not all of a part."""
    decoder = _decoder_shapes()
    there = [part for part in PARTS if any(name.startswith(part) for name in beside)]
    expected = {name: shape for name, shape in decoder.items() if name.startswith(tuple(there))}
    return beside.items() < expected.items()


def _not_used(beside: Shapes) -> str:
    """Why of a file with these tensors the encoder alone is taken; "" where it has none, or a whole decoder."""
    decoder = _decoder_shapes()
    if foreign := sorted(name for name, shape in beside.items() if decoder.get(name) != shape):
        return f"its image encoder alone is used, for {name_some(foreign, 'tensors')} beside it are not SAM's own"
    if beside and beside != decoder:
        (missing,) = (part for part in PARTS if not any(name.startswith(part) for name in beside))
        return f"its image encoder alone is used, for it has no {missing.removesuffix('.')}"
    return ""


def _unlike(name: str, expected: Shapes, found: Shapes, origin: str) -> str:
    return f"{origin} looks most like {name}, but: {differences(expected, found)}"


def _renamed_shapes(encoder: nn.Module, names: Mapping[str, str]) -> Shapes:
    return {names[key]: shape for key, shape in shapes_of(encoder.state_dict()).items()}


@cache
def _decoder_shapes() -> Shapes:
    with torch.device("meta"):
        sam: Sam = untrained_sam(nn.Identity())
    return shapes_of(sam.state_dict())
