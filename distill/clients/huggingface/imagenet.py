"""Where ImageNet weights would come from. This folder has the student's own, so there are none."""

from pathlib import Path

from torch import nn

from .errors import InputError

WHY = "this folder holds a trained student; a new one begins with ImageNet weights in sam-distill"


def refuse_without_network(timm_name: str) -> None:
    """Raise `InputError`."""
    raise InputError(f"{timm_name}: {WHY}")


def repository_of(timm_name: str) -> str:
    """Raise `InputError`."""
    raise InputError(f"{timm_name}: {WHY}")


def load_from_file(backbone: nn.Module, path: Path, name: str, whole: object) -> None:
    """Raise `InputError`."""
    raise InputError(f"{name}: {WHY}")
