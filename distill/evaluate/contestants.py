"""Who is evaluated: the run's student, a checkpoint, or several side by side, the teacher among them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import nn

from distill.recipe import Recipe
from distill.run import chosen_students
from distill.schema import TEACHER
from embeddings_cache.system import sha256
from embeddings_cache.teacher import inspect_teacher, load_teacher
from students import InputError, build_student_sam, is_our_student, load_student, require_decoder, weight_files


@dataclass(frozen=True)
class Contestant:
    """A name for tables, and the checkpoint; None is the recipe's teacher."""

    name: str
    path: Path | None

    def inputs(self, recipe: Recipe) -> dict[str, Any]:
        """What this one's results depend on."""
        teacher = {"teacher": recipe.teacher.name, "teacher_sha256": digest_of(recipe.teacher.checkpoint)}
        if self.path is None:
            return {**teacher, "dtype": self.dtype(recipe), "image_size": recipe.image_size}
        return {"sha256": digest_of(self.path), **(teacher if needs_decoder(self.path) else {})}

    def dtype(self, recipe: Recipe) -> str:
        """float32, so that nobody has an advantage; the teacher's is what `teacher.dtype` says, unless that is auto."""
        return "float32" if self.path is not None or recipe.teacher.dtype == "auto" else recipe.teacher.dtype

    def in_decoder(self) -> bool:
        """Whether the recipe's teacher is needed: to take part, or for its decoder."""
        return self.path is None or needs_decoder(self.path)


def contestants_of(recipe: Recipe) -> list[Contestant]:
    """Whom `checkpoint` names, under names of which no two are alike.

    Raises:
        InputError: one of them is not there.
    """
    taken = {TEACHER: 1}  # by the teacher, whatever a checkpoint is called
    named = []
    for path in dict.fromkeys(chosen_students(recipe)):
        if path is None:
            named.append(Contestant(TEACHER, None))
            continue
        name = path.parent.resolve().name if path.stem == "student" else path.stem
        taken[name] = taken.get(name, 0) + 1
        named.append(Contestant(name if taken[name] == 1 else f"{name} ({taken[name]})", path))
    return named


def needs_decoder(path: Path) -> bool:
    """Whether a checkpoint holds an encoder alone, and is evaluated with the teacher's decoder."""
    return is_our_student(path) or not inspect_teacher(path).has_decoder


def load_contestant(contestant: Contestant, teacher: Sam | None) -> Sam:
    """A whole SAM: a student of ours in the teacher's, a published one with the decoder that it brings.

    Args:
        teacher: None where it is not needed (`in_decoder`).

    Raises:
        InputError: it cannot be had, or does not fit the teacher's decoder.
    """
    path = contestant.path
    if path is None:
        assert teacher is not None
        return teacher
    if not is_our_student(path):
        found = inspect_teacher(path)
        sam = load_teacher(found.name, str(path), found.image_size)
        if found.has_decoder:
            return sam
        encoder: nn.Module = sam.image_encoder
    else:
        encoder = load_student(path)
    assert teacher is not None
    return complete(encoder, path, teacher)


def complete(encoder: nn.Module, path: Path, teacher: Sam) -> Sam:
    """An encoder with the teacher's prompt encoder and decoder.

    Raises:
        InputError: it is for images of another size, or makes other channels; names the file that it is from.
    """
    try:
        return build_student_sam(encoder, teacher)
    except ValueError as error:
        raise InputError(f"{path} does not fit the teacher's decoder: {error}") from error


def load_decoder(recipe: Recipe, device: torch.device) -> Sam:
    """The recipe's teacher, which has a decoder.

    Raises:
        InputError: it has none, or cannot be had.
    """
    teacher = load_teacher(recipe.teacher.name, recipe.teacher.checkpoint, recipe.image_size).to(device)
    require_decoder(teacher)
    return teacher


def digest_of(checkpoint: str | Path | None) -> str | list[str] | None:
    """SHA-256 of a checkpoint's file, or of each; None where there is none, and weights are the package's."""
    digests = [sha256(file) for file in weight_files(checkpoint)] if checkpoint else []
    return digests if len(digests) > 1 else next(iter(digests), None)
