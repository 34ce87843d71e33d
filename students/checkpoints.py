"""Students on disk: safetensors, with all it takes to build the student again in the metadata."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from students.encoder import StudentConfig, StudentEncoder, build_encoder, config_dict
from students.errors import InputError, first_line

FORMAT = "sam-distill student"


def save_student(path: Path, student: StudentEncoder, metadata: Mapping[str, str]) -> None:
    """Write weights and config. `metadata` values are free text (`recipe` holds the resolved recipe's YAML)."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    own = {"format": FORMAT, "student": json.dumps(config_dict(student))}
    save_file(tensors, path, metadata={**metadata, **own})


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a student file.

    Raises:
        InputError: no such file, not safetensors, or not one of our students.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"no student at {path}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} is not a student of ours: its metadata does not say format={FORMAT!r}")
    return metadata


def load_student(path: Path) -> StudentEncoder:
    """Build the student that a file holds, in eval mode on the CPU.

    Raises:
        InputError: the file is missing, foreign or damaged.
    """
    try:
        config = StudentConfig(**json.loads(read_metadata(path)["student"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not say what student it holds: {first_line(error)}") from error
    student = build_encoder(config)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    try:
        student.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise InputError(f"{path} does not hold the weights of a {config.name}: {first[:300]}") from error
    return student.eval()
