"""Reading names and tensors out of files from strangers: nothing in them is executed or unpacked beyond its size."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from students.errors import InputError, first_line

Shapes = Mapping[str, tuple[int, ...]]

NAMED_AT_MOST = 3


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, on the CPU and not read before they are used, where the format allows.

    Args:
        path: safetensors, or what `torch.save` wrote: a state dict, bare or under `model` or `state_dict`, with or
            without DDP's `module.` prefix.

    Raises:
        InputError: no such file, not a checkpoint, or one that holds more than tensors.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a readable safetensors file: {first_line(error)}") from error
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _refuse_compressed(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
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
    if any(t.layout != torch.strided or t.is_quantized or t.is_meta or t.is_complex() for t in content.values()):
        raise InputError(f"{path} holds sparse, quantized, complex or empty tensors: no weights that are known")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def shapes_of(state: Mapping[str, torch.Tensor]) -> Shapes:
    """Name → shape."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def differences(expected: Shapes, found: Shapes) -> str:
    """What is missing, surplus or of another shape, a few names of each; "" where nothing is."""
    missing, surplus = sorted(expected.keys() - found), sorted(found.keys() - expected)
    other = [key for key in sorted(expected.keys() & found) if expected[key] != found[key]]
    parts = [name_some(missing, "missing"), name_some(surplus, "surplus")]
    parts += [f"{key} is {list(found[key])}, not {list(expected[key])}" for key in other[:NAMED_AT_MOST]]
    if len(other) > NAMED_AT_MOST:
        parts.append(f"{len(other) - NAMED_AT_MOST} more of another shape")
    return "; ".join(filter(None, parts))


def name_some(keys: Sequence[str], what: str) -> str:
    """`5 missing (a, b, c, ...)`, printable whatever the names are."""
    shown = ", ".join(key.encode("unicode_escape").decode()[:100] for key in keys[:NAMED_AT_MOST])
    return f"{len(keys)} {what} ({shown}{', ...' if len(keys) > NAMED_AT_MOST else ''})" if keys else ""


def _refuse_compressed(path: Path) -> None:
    """PyTorch stores tensors as they are; what is compressed could unpack to anything, and cannot be mapped."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [member for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
    except Exception as error:  # a stranger's archive fails in many ways
        raise InputError(f"{path} is not a checkpoint: {first_line(error)}") from error
    if compressed:
        unpacked = sum(member.file_size for member in compressed)
        raise InputError(f"{path} is compressed, as no checkpoint is: {unpacked:,} bytes unpacked; not loaded")
