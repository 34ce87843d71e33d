"""Checkpoints on disk: our students' safetensors, and SAMs and students as others publish them."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from segment_anything.modeling import Sam

from students.architectures import Contents, architecture, recognise
from students.encoder import StudentConfig, StudentEncoder, build_encoder, config_dict
from students.errors import InputError, first_line
from students.layouts import PREFIX, published_names, unused_shapes
from students.naming import sam_names
from students.sam import encoder_only_sam, untrained_sam
from students.state_dicts import differences, read_state_dict, shapes_of

FORMAT = "sam-distill student"
LARGEST_EMBED_DIM = 8192

KINDS: dict[str, type | UnionType] = {
    "name": str, "image_size": int, "embed_dim": int, "overrides": dict, "downsample": str, "neck": str,
    "neck_depth": int, "neck_expand": int, "input_size": int | None,
}  # fmt: skip


def save_student(path: Path, student: StudentEncoder, metadata: Mapping[str, str]) -> None:
    """Write weights and config. `metadata` values are free text (`recipe` holds the resolved recipe's YAML)."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    own = {"format": FORMAT, "student": json.dumps(config_dict(student))}
    path.write_bytes(save(tensors, metadata={**metadata, **own}))  # save_file would keep it to its maker


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a student file.

    Raises:
        InputError: no such file, not safetensors, or not one of our students.
    """
    metadata = _any_metadata(path)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is not a student of ours: its metadata does not say format={FORMAT!r}")
    return metadata


def load_student(path: str | Path) -> StudentEncoder:
    """Build the student that a file holds, in eval mode on the CPU.

    Raises:
        InputError: the file is missing, foreign or damaged.
    """
    path = Path(path)
    config = _config_of(path)
    with torch.device("meta"):  # a file's word must not decide how much memory is asked for
        expected = shapes_of(build_encoder(config).state_dict())
    with safe_open(path, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
        if differing := differences(expected, found):
            raise InputError(f"{path} does not hold the weights of a {config.name}: {differing}")
        tensors = {name: file.get_tensor(name) for name in found}
    with torch.random.fork_rng(devices=[]):  # weights that are drawn only to be replaced must not move a run's seed
        student = build_encoder(config)
    student.load_state_dict(tensors)
    return student.eval()


def load_checkpoint(path: str | Path) -> Sam:
    """A `Sam` from any checkpoint that is known: segment-anything's, transformers', a published student's, or ours.

    Args:
        path: `.pth`, `.pt` or `.safetensors` with a state dict in its publisher's layout, also of other sizes of their
            encoders, as training code wraps them (`read_state_dict`, `sam_names`); a directory that transformers'
            `SamModel.save_pretrained` wrote; or `student.safetensors`. Nothing in it is executed.

    Returns:
        `Sam` in eval mode on the CPU, float32 whatever the file has. Where the file has no prompt encoder and mask
        decoder, or something that is not SAM's is added to them, only its encoder works (`encoder_only_sam`), and
        `left_out` says why. A ViT whose positions are for another image size works at that one.

    Raises:
        InputError: the file is missing, damaged, holds more than tensors, or is none of these; names the tensors that
            differ from the one that it looks most like.
    """
    path = Path(path)
    if is_our_student(path):
        return encoder_only_sam(load_student(path), str(path)).eval()
    state = _read_sam(path)
    found = recognise(shapes_of(state), str(path))
    known = architecture(found.name, found.image_size)
    with torch.random.fork_rng(devices=[]):
        encoder = known.build()
        if found.has_decoder:
            sam = untrained_sam(encoder, found.image_size)
        else:
            sam = encoder_only_sam(encoder, str(path), found.left_out)
    encoder.load_state_dict({ours: state.pop(theirs) for ours, theirs in known.names.items()})
    if found.has_decoder:
        sam.load_state_dict({key: tensor for key, tensor in state.items() if not key.startswith(PREFIX)}, strict=False)
    return sam.eval()


def load_encoder(path: str | Path) -> StudentEncoder:
    """The student in a checkpoint, ours or a published one, in eval mode on the CPU.

    Raises:
        InputError: as `load_checkpoint`, or it holds an encoder that is no student.
    """
    encoder = load_checkpoint(path).image_encoder
    if not isinstance(encoder, StudentEncoder):
        raise InputError(f"{path} holds {architecture_of(path)}, which is no student's encoder")
    return encoder


def student_config_of(path: str | Path) -> StudentConfig:
    """What `load_encoder` would load, without its weights where the file is ours; raises as it does."""
    path = Path(path)
    return _config_of(path) if is_our_student(path) else load_encoder(path).config


def inspect_checkpoint(path: str | Path) -> Contents:
    """What `load_checkpoint` would load, without its weights.

    Raises:
        InputError: as `load_checkpoint`.
    """
    path = Path(path)
    if is_our_student(path):
        return Contents("student", _config_of(path).image_size, has_decoder=False)
    return recognise(shapes_of(_read_sam(path)), str(path))


def architecture_of(path: str | Path) -> str:
    """The name of what `inspect_checkpoint` finds."""
    return inspect_checkpoint(path).name


def identify(path: str | Path) -> tuple[str, bool]:
    """`architecture_of`, and whether the file has prompt encoder and mask decoder."""
    found = inspect_checkpoint(path)
    return found.name, found.has_decoder


def is_our_student(path: Path) -> bool:
    """Whether a file is one that `save_student` wrote."""
    return path.suffix == ".safetensors" and not path.is_dir() and _any_metadata(path).get("format") == FORMAT


def save_published(path: Path, student: StudentEncoder, sam: Sam) -> None:
    """Write a student in the layout of its family's publisher, with the prompt encoder and mask decoder of a SAM.

    Where the student is of their size, names and shapes are those of MobileSAM's, RepViT-SAM's, EdgeSAM's or
    EfficientViT-SAM's checkpoint.
    TinyViT's classifier, which MobileSAM keeps without using it, is filled with zeros.
    """
    tensors = student.state_dict()
    state = {theirs: tensors[ours] for ours, theirs in published_names(student).items()}
    state |= {name: torch.zeros(shape) for name, shape in unused_shapes(student).items()}
    state |= {name: tensor for name, tensor in sam.state_dict().items() if not name.startswith(PREFIX)}
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)


def _read_sam(path: Path) -> dict[str, torch.Tensor]:
    return sam_names(read_state_dict(path), str(path))


def _config_of(path: Path) -> StudentConfig:
    """Of a student of ours.

    Raises:
        InputError: the file is missing, foreign, or its config makes no sense.
    """
    try:
        config = StudentConfig(**json.loads(read_metadata(path)["student"]))
        for key, kind in KINDS.items():
            if not isinstance(getattr(config, key), kind):
                raise TypeError(f"{key} is {getattr(config, key)!r}")
        if not 1 <= config.embed_dim <= LARGEST_EMBED_DIM:
            raise ValueError(f"embed_dim is {config.embed_dim}")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not say what student it holds: {first_line(error)}") from error
    return config


def _any_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"no student at {path}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error
