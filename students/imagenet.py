"""Where a student's ImageNet weights come from: the hub, if it can be reached, or a file."""

from collections.abc import Collection
from pathlib import Path

import huggingface_hub
import timm
from torch import nn

from students.errors import InputError
from students.hub import unreachable
from students.state_dicts import differences, read_state_dict, shapes_of


def refuse_without_network(timm_name: str) -> None:
    """Say at once that weights are neither here nor to be had; the hub's own client tries for a minute, aloud.

    Raises:
        InputError: timm has none, or they are not in the hub's cache and it does not answer.
    """
    repository = repository_of(timm_name)
    names = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(huggingface_hub.try_to_load_from_cache(repository, name), str) for name in names):
        return
    if why := unreachable():
        raise InputError(
            f"ImageNet weights of {timm_name!r} cannot be had: {why}; student.pretrained=FILE takes a local file"
        )


def repository_of(timm_name: str) -> str:
    """Where on the hub a model's ImageNet weights lie; raises `InputError` where timm has none."""
    published = timm.get_pretrained_cfg(timm_name)
    if published is None or published.hf_hub_id is None:
        raise InputError(f"timm has no ImageNet weights of {timm_name!r}")
    return str(published.hf_hub_id)


def load_from_file(backbone: nn.Module, path: Path, name: str, whole: Collection[str]) -> None:
    """Fill one of timm's backbones; what the file has of its classifier is left out.

    Args:
        whole: names of all tensors of the model that the backbone was cut from.

    Raises:
        InputError: the file cannot be read, or is of another model.
    """
    wanted = backbone.state_dict()
    cut_off = set(whole) - wanted.keys()
    state = {key: tensor for key, tensor in read_state_dict(path).items() if key not in cut_off}
    if differing := differences(shapes_of(wanted), shapes_of(state)):
        raise InputError(f"{path} does not hold timm's weights of {name}: {differing}")
    backbone.load_state_dict(state)
