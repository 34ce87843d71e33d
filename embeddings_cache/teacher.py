"""The teacher: any SAM whose embeddings a student shall learn."""

import hashlib
from pathlib import Path

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import nn

from embeddings_cache.toy_teacher import load_toy_teacher
from embeddings_cache.vit import fuse_attention
from students import InputError

TEACHERS = ("vit_h", "vit_l", "vit_b", "toy")
"""vit_*: segment-anything's three, with a checkpoint in the published layout. toy: comes with the package."""

SAM_IMAGE_SIZE = 1024


def check_teacher(name: str, checkpoint: str | None, image_size: int) -> None:
    """Refuse what `load_teacher` cannot load, without loading it.

    Raises:
        InputError: no checkpoint, or an image size that the teacher cannot work at.
    """
    if name == "toy":
        if checkpoint is not None:
            raise InputError(f"teacher.name=toy takes no teacher.checkpoint; got {checkpoint}")
        if image_size % 16:
            raise InputError(f"image_size={image_size} is not a multiple of 16")
        return
    if image_size != SAM_IMAGE_SIZE:
        raise InputError(f"teacher {name} works at image_size={SAM_IMAGE_SIZE}, not {image_size}")
    if checkpoint is None:
        raise InputError(f"teacher {name} needs its weights: teacher.checkpoint=FILE, one of segment-anything's .pth")
    if not Path(checkpoint).is_file():
        raise InputError(f"teacher.checkpoint={checkpoint}: no such file")


def load_teacher(name: str, checkpoint: str | None, image_size: int) -> Sam:
    """Build a teacher and load its weights.

    Args:
        name: one of `TEACHERS`; a fine-tuned SAM goes by the name of its architecture.
        checkpoint: a state dict in segment-anything's layout, bare or under `model` or `state_dict`, with or without
            DDP's `module.` prefix. Read with `weights_only=True`: nothing in it is executed.
        image_size: side of the square input in pixels.

    Returns:
        `Sam` in eval mode on the CPU, without gradients, with fused attention (`fuse_attention`).

    Raises:
        InputError: the checkpoint is missing, unreadable, or another architecture's.
    """
    check_teacher(name, checkpoint, image_size)
    with torch.random.fork_rng(devices=[]):  # weights that are drawn only to be replaced must not move a run's seed
        sam = load_toy_teacher(image_size) if checkpoint is None else _load_checkpoint(name, Path(checkpoint))
    fuse_attention(sam.image_encoder)
    return sam.eval().requires_grad_(False)


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the state dict's names, types and values; the container it came in does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _load_checkpoint(name: str, path: Path) -> Sam:
    state = _read_state_dict(path)
    sam = sam_model_registry[name](checkpoint=None)
    try:
        sam.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise InputError(f"{path} does not hold the weights of a {name}: {first[:300]}") from error
    return sam


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; torch's advice to load without weights_only is not ours to repeat
        kind = type(error).__name__
        raise InputError(f"{path} is not a checkpoint, or holds more than tensors: not loaded ({kind})") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise InputError(f"{path} holds no state dict (names and tensors), but a {type(content).__name__}")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}
