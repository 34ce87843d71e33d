"""Where in a stranger's names the SAM is: told by the neck in which all of its encoders end, whatever stands before."""

from collections.abc import Mapping

import torch
from segment_anything.modeling import Sam
from torch import nn

from students.errors import InputError
from students.hugging_face import VISION_PREFIX, from_hugging_face
from students.layouts import PREFIX
from students.state_dicts import name_some

NECKS = {
    "neck.0.weight": PREFIX,
    "neck.input_ops.0.op_list.0.conv.weight": PREFIX,
    "neck.conv1.weight": VISION_PREFIX,
}
"""The neck's first weight in segment-anything's and most published layouts, in EfficientViT-SAM's, and in
transformers'; and what stands before it in a whole SAM."""

STATISTICS = ("pixel_mean", "pixel_std")
"""What images are normalised by; segment-anything does not save them, some training code does."""


def sam_names(state: Mapping[str, torch.Tensor], origin: str) -> dict[str, torch.Tensor]:
    """A state dict under segment-anything's names, or those of a published layout.

    What all of a SAM's names begin with (`sam.`, `net.`) is dropped, an encoder alone gets its prefix, transformers'
    names are translated, and SAM's own `STATISTICS` left out. Names in which no encoder is found stay as they are.

    Raises:
        InputError: there are several encoders, or images are normalised by other statistics than SAM's.
    """
    state = _without_statistics(state, origin)
    places = [
        (name.removesuffix(neck), prefix)
        for name in state
        for neck, prefix in NECKS.items()
        if name == neck or name.endswith(f".{neck}")
    ]
    if len(places) > 1:
        several = name_some([place for place, _ in places], "image encoders")
        raise InputError(f"{origin} holds {several}: save the one that is meant by itself")
    if not places:
        return state
    ((place, prefix),) = places
    root = place[: place.rstrip(".").rfind(".") + 1]
    named = {
        prefix + name.removeprefix(place) if name.startswith(place) else name.removeprefix(root): tensor
        for name, tensor in state.items()
    }
    if len(named) < len(state):  # two tensors would go by one name
        return state
    return from_hugging_face(named, origin) if prefix == VISION_PREFIX else named


def _without_statistics(state: Mapping[str, torch.Tensor], origin: str) -> dict[str, torch.Tensor]:
    """Everything but `STATISTICS`, of pixels from 0 to 255 or from 0 to 1, which must be SAM's."""
    sam = Sam(nn.Identity(), nn.Identity(), nn.Identity())
    kept = dict(state)
    for name, tensor in state.items():
        kind = name.rpartition(".")[2]
        if kind not in STATISTICS:
            continue
        expected = getattr(sam, kind).flatten()
        if not any(_equal(tensor, expected / scale) for scale in (1, 255)):
            raise InputError(
                f"{origin} normalises images by {kind} {_shown(tensor)}; here they are normalised by SAM's, "
                f"{_shown(expected)}"
            )
        del kept[name]
    return kept


def _shown(values: torch.Tensor) -> list[float]:
    return [round(value, 3) for value in values.flatten()[:3].tolist()]


def _equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Up to the precision of the type that it was stored in."""
    precision = max(1e-5, torch.finfo(found.dtype).eps) if found.is_floating_point() else 0.0
    return found.numel() == expected.numel() and torch.allclose(found.flatten().float(), expected, precision, 0.0)
