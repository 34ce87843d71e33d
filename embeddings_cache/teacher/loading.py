"""The teacher: any SAM whose embeddings a student shall learn."""

import hashlib
from pathlib import Path

import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import nn

from embeddings_cache.teacher.toy import load_toy_teacher, read_toy_state
from embeddings_cache.teacher.vit import fuse_attention
from students import (
    VITS,
    Contents,
    InputError,
    fetch_from_hub,
    inspect_checkpoint,
    is_hub_address,
    known_architectures,
    load_checkpoint,
)

SAM_IMAGE_SIZE = 1024


def known_teachers() -> list[str]:
    """All that a checkpoint may hold; `student`, one of ours, which has no decoder; and `toy`, which needs none."""
    return [*known_architectures(), "student", "toy"]


def inspect_teacher(checkpoint: str | Path) -> Contents:
    """What may teach of what a checkpoint holds: what `inspect_checkpoint` knows, or a toy.

    Raises:
        InputError: as `inspect_checkpoint`.
    """
    try:
        return inspect_checkpoint(checkpoint)
    except InputError as error:
        try:
            positions = read_toy_state(checkpoint)["image_encoder.pos_embed"]
        except InputError:
            raise error from None
    return Contents("toy", 16 * positions.shape[1], has_decoder=True)


def check_teacher(name: str, checkpoint: str | None, image_size: int) -> None:
    """Refuse what `load_teacher` cannot load, without loading it.

    Raises:
        InputError: no checkpoint, another architecture's, or one that works at another image size.
    """
    if name == "toy" and image_size % 16:
        raise InputError(f"image_size={image_size} is not a multiple of 16")
    if name == "toy" and checkpoint is None:
        return
    if checkpoint is None:
        raise InputError(f"teacher {name} needs its weights: teacher.checkpoint=FILE")
    if is_hub_address(checkpoint):  # what could be fetched goes by its path
        fetch_from_hub(checkpoint)
    if not Path(checkpoint).exists():
        other = name in VITS and image_size != SAM_IMAGE_SIZE
        hint = f"; segment-anything's own works at image_size={SAM_IMAGE_SIZE}, not {image_size}" if other else ""
        raise InputError(f"teacher.checkpoint={checkpoint}: no such file{hint}")
    if name == "toy":
        read_toy_state(checkpoint)
        return
    found = inspect_teacher(checkpoint)
    if found.name != name:
        raise InputError(f"{checkpoint} holds a {found.name}, not a {name}: teacher.name={found.name} takes it")
    if found.image_size != image_size:
        raise InputError(f"{checkpoint} works at image_size={found.image_size}, not {image_size}")


def load_teacher(name: str, checkpoint: str | None, image_size: int) -> Sam:
    """Build a teacher and load its weights.

    Args:
        name: one of `known_teachers()`; a fine-tuned SAM goes by the name of its architecture.
        checkpoint: anything that `load_checkpoint` loads, or a toy's; without one, a toy has the package's weights.
        image_size: side of the square input in pixels; of a checkpoint, the one that its positions are for. A toy takes
            any.

    Returns:
        `Sam` in eval mode on the CPU, without gradients, a ViT with fused attention (`fuse_attention`).
        `students.left_out` says what of the checkpoint is not used.

    Raises:
        InputError: the checkpoint is missing, unreadable, another architecture's, or for another image size.
    """
    check_teacher(name, checkpoint, image_size)
    if name == "toy":
        with torch.random.fork_rng(devices=[]):
            sam = load_toy_teacher(image_size, checkpoint)
    else:
        assert checkpoint is not None
        sam = load_checkpoint(checkpoint)
    if isinstance(sam.image_encoder, ImageEncoderViT):
        fuse_attention(sam.image_encoder)
    return sam.eval().requires_grad_(False)


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the state dict's names, types and values; the container it came in does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
