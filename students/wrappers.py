"""What training code wraps around a model's weights: dictionaries with more in them, and prefixes of their names."""

from collections.abc import Mapping
from typing import Any

import torch

WRAPPERS = (
    "model", "state_dict", "model_state_dict", "module", "net", "network", "sam", "sam_model", "weights", "params",
    "ema",
)  # fmt: skip
"""Entries of a checkpoint that hold weights; where there are several, the first of these is taken."""

LEVELS = 4
"""Wrappers within wrappers, at most."""

WRAPPING_MODULES = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names, anywhere in them."""


def state_dict_within(content: Any, levels: int = LEVELS) -> dict[str, torch.Tensor]:
    """The weights in what a training run has saved: a state dict, or a dictionary that has one somewhere.

    Args:
        content: anything. What is no tensor (an epoch, an optimizer's state) is passed over.
        levels: how deep to look under the names of `WRAPPERS`; another name is taken where it alone has tensors.

    Returns:
        Name → tensor; empty where there is no state dict, or nothing tells which of several is meant.
    """
    if not isinstance(content, dict):
        return {}
    inner = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, dict) and value and levels
    }
    for name in WRAPPERS:
        if name in inner and (found := state_dict_within(inner[name], levels - 1)):
            return found
    own = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
    others = [found for value in inner.values() if (found := state_dict_within(value, levels=0))]
    if len(others) == 1 and len(others[0]) > len(own):  # under a name of their own, beside a loss, say
        return others[0]
    return own


def plain_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors by the names that they have in a model without `WRAPPING_MODULES`."""
    plain = {
        ".".join(part for part in name.split(".") if part not in WRAPPING_MODULES): tensor
        for name, tensor in state.items()
    }
    return plain if len(plain) == len(state) else dict(state)
