"""Reading names and tensors out of files from strangers: nothing in them is executed or unpacked beyond its size."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from students.errors import InputError, first_line
from students.pickles import foreign_names, save_again
from students.wrappers import plain_names, state_dict_within

Shapes = Mapping[str, tuple[int, ...]]

NAMED_AT_MOST = 3

INDEX = ".index.json"
IN_A_DIRECTORY = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
"""What Hugging Face's `save_pretrained` writes, by its version and the size of the model."""


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, on the CPU and not read before they are used, where the format allows.

    Args:
        path: safetensors, or what `torch.save` wrote: a state dict, bare or under `model`, `state_dict` and the like
            (`wrappers.WRAPPERS`) beside other things, with or without what DDP and torch.compile put into names; or a
            directory or an index of several such files (`weight_files`).

    Raises:
        InputError: no such file, not a checkpoint, or one that holds more than tensors, numbers and text.
    """
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        state |= _read_file(file)
    if any(t.layout != torch.strided or t.is_quantized or t.is_meta or t.is_complex() for t in state.values()):
        raise InputError(f"{path} holds sparse, quantized, complex or empty tensors: no weights that are known")
    return plain_names(state)


def weight_files(path: str | Path) -> list[Path]:
    """The files in which a checkpoint's weights lie.

    Args:
        path: a file, which is its own; an index of several beside it (`model.safetensors.index.json`); or a directory
            with one of `IN_A_DIRECTORY`.

    Raises:
        InputError: there is no such file, a directory has none of these, or an index is damaged.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in IN_A_DIRECTORY if (path / name).is_file()), None)
        if found is None:
            raise InputError(f"{path} is a directory without {IN_A_DIRECTORY[0]}, as SamModel.save_pretrained makes it")
        path = found
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return _files_of_index(path) if path.name.endswith(INDEX) else [path]


def _files_of_index(path: Path) -> list[Path]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {first_line(error)}") from error
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(_lies_beside(name) for name in files.values()):
        raise InputError(f"{path} is no index of weights: it has no weight_map of names to files beside it")
    names = sorted(set(files.values()))
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise InputError(f"{path} names files that are not there: {name_some(missing, 'missing')}")
    return [path.parent / name for name in names]


def _lies_beside(name: Any) -> bool:
    return isinstance(name, str) and not {"/", "\\"} & set(name)


def _read_file(path: Path) -> dict[str, torch.Tensor]:
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
        raise InputError(
            f"{path} is not a checkpoint, or holds more than tensors: not loaded ({kind}){_what_to_do(path)}"
        ) from error
    if not (state := state_dict_within(content)):
        entries = f" of {name_some([str(key) for key in content], 'entries')}" if isinstance(content, dict) else ""
        raise InputError(f"{path} holds no state dict (names and tensors), but a {type(content).__name__}{entries}")
    return state


def _what_to_do(path: Path) -> str:
    """For a file that is not loaded: what loading it would execute, and how its owner gets the weights out of it."""
    try:
        if not (foreign := foreign_names(path)):
            return ""
        lines = save_again(path)
    except Exception:  # a stranger's pickle is malformed in many ways, and the file is refused already
        return ""
    what = name_some(foreign, "of another kind")
    return f": {what}. Loading them executes code; if you trust the file, save its weights alone: {lines}"


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
