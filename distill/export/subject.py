"""What is exported: an encoder from any checkpoint that loads, and the decoder that belongs to it."""

import re
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from segment_anything.modeling import Sam
from torch import nn

from distill.clients.segmenter import FINGERPRINT
from distill.recipe import Recipe
from distill.recipe_files import parse_yaml
from distill.run import chosen_student, other_teacher, published_checkpoint
from distill.schema import FORMATS
from embeddings_cache.images import scene_count
from embeddings_cache.teacher import inspect_teacher, load_teacher, weights_sha256
from students import (
    InputError,
    StudentEncoder,
    build_student_sam,
    identify,
    is_our_student,
    left_out,
    load_checkpoint,
    load_student,
    read_metadata,
)

NEED_MASKS = (
    "onnx_int8", "onnx_decoder", "onnx_decoder_batch", "onnx_trt", "coreml", "coreml_8bit", "coreml_6bit",
    "coreml_6bit_grouped", "coreml_4bit", "coreml_decoder_8bit", "cvat",
    "anylabeling", "label_studio", "web", "transformers_js", "huggingface",
)  # fmt: skip
"""Formats that hold a decoder, or whose proof needs one."""


NOT_SAID = "not said; those of the teacher and of the images may bind it"
"""The licence of a student where nobody has decided on one."""


@dataclass(frozen=True)
class Subject:
    """An encoder in eval mode on the CPU, and a `Sam` with the decoder; None where there is no decoder.

    `encoder` is what the files hold; with `export.input=native` it takes fewer pixels than `whole`, which reduces them.
    `teacher` is whose decoder that is, or would be; `recipe` trained the student, None for a checkpoint from elsewhere;
    `note` is a line for whoever uses the files.
    """

    name: str
    teacher: str
    recipe: str | None
    encoder: nn.Module
    whole: nn.Module
    sam: Sam | None
    note: str | None
    asked: str | None = None
    """`export.name`."""
    license: str = ""
    """Under which the files are handed out, as far as that is known."""

    @property
    def prefix(self) -> str:
        """Of the names of Core ML packages: `export.name`, or the student's name as Swift writes it."""
        return class_name(self.name) if self.asked is None else self.asked

    @property
    def image_size(self) -> int:
        """Side of the square image in whose pixels prompts are given."""
        return int(self.whole.img_size)  # type: ignore[arg-type]

    @property
    def channels(self) -> int | None:
        """Of the embedding, as the decoder takes it; None where there is none."""
        return self.sam.prompt_encoder.embed_dim if self.sam else None

    @property
    def marks(self) -> dict[str, str]:
        """What the files say of themselves: their fingerprint, where there is a decoder, and the licence."""
        fingerprint = {FINGERPRINT: self.fingerprint} if self.fingerprint else {}
        return {**fingerprint, "license": self.license}

    @cached_property
    def fingerprint(self) -> str | None:
        """What encoder and decoder that belong together have in common; None where there is no decoder."""
        return weights_sha256(self.sam)[:16] if self.sam else None


def trained_by(recipe: Recipe) -> dict[str, Any]:
    """The recipe that trained the chosen student, which lies in its file; nothing where none does."""
    path = chosen_student(recipe)
    written = read_metadata(path).get("recipe") if is_our_student(path) else None
    return parse_yaml(written, str(path)) if written else {}


def saw_scenes_alone(kept: dict[str, Any]) -> bool:
    """Whether a recipe's student has learnt from generated scenes, and began from nothing that has seen photographs."""
    student = kept.get("student") or {}
    fresh = not student.get("start") and not student.get("pretrained")
    return fresh and bool(scene_count((kept.get("data") or {}).get("images")))


def license_of(recipe: Recipe) -> str:
    """`export.license`; where nothing is said, what is known of it. The toy teacher and scenes are this project's."""
    if recipe.export.license is not None:
        return recipe.export.license
    if not is_our_student(chosen_student(recipe)):
        return "that of the checkpoint it was converted from"
    kept = trained_by(recipe)
    ours = saw_scenes_alone(kept) and (kept.get("teacher") or {}).get("name") == "toy"
    return "Apache-2.0" if ours else NOT_SAID


def class_name(name: str) -> str:
    """A student's name as a class is called in Swift: repvit_m2_3 → RepViTM23."""
    words = "".join(word[:1].upper() + word[1:] for word in re.split(r"[^A-Za-z0-9]+", name))
    for spelt in ("ViT", "NeXt", "Net", "SAM"):
        words = re.sub(spelt, spelt, words, flags=re.IGNORECASE)
    return words if words[:1].isalpha() else f"Student{words}"


def wanted_formats(recipe: Recipe) -> list[str]:
    """`export.formats`, each once and in the order of `FORMATS`."""
    asked = recipe.export.formats
    return [name for name in FORMATS if name in asked or "all" in asked]


def check_formats(recipe: Recipe) -> None:
    """Refuse formats that cannot be made here, before anything else is done.

    Raises:
        InputError: coremltools is not installed, there is no decoder, or a program takes students of another size.
    """
    formats = wanted_formats(recipe)
    for kind in recipe.export.formats if published_checkpoint(recipe) is None else ():
        if reason := refusal(kind, recipe.image_size, None):
            raise InputError(f"export.formats: {reason}")
    coreml = [name for name in formats if name.startswith("coreml")]
    if coreml and find_spec("coremltools") is None:
        raise InputError(
            f"export.formats: {', '.join(coreml)} needs coremltools, which is not installed (pip install coremltools); "
            "name the other formats to do without"
        )
    need = [name for name in formats if name in NEED_MASKS]
    if need and not _decoder_expected(recipe):
        given = recipe.teacher.checkpoint
        where = f"{given} is not there, or has none" if given else "teacher.checkpoint=FILE"
        raise InputError(
            f"export.formats: {', '.join(need)} needs the teacher's mask decoder: {where}; "
            "export.formats=[onnx, onnx_fp16] compares embeddings alone"
        )


def refusal(kind: str, image_size: int, channels: int | None) -> str | None:
    """Why a format cannot be made of a student, for images of a size and with so many channels, where it cannot."""
    if kind in ("cvat", "anylabeling") and (image_size != 1024 or channels not in (256, None)):
        return (
            f"{kind} takes students of 1024 px and 256 channels, which its programs have written into them, and not of "
            f"{image_size} px{f' and {channels} channels' if channels else ''}"
        )
    return None


def unfit(kind: str, subject: Subject) -> str | None:
    """Why a format cannot be made of this encoder, where it cannot."""
    if kind == "huggingface" and not isinstance(subject.whole, StudentEncoder):
        return (
            f"huggingface takes students; {subject.name} has an encoder that transformers' SamModel knows: "
            "stage=convert writes it"
        )
    if kind == "transformers_js" and subject.encoder is not subject.whole:
        return "transformers_js goes with export.input=sam: it knows one size, of pictures and of prompts"
    return None


def is_untrained(path: Path) -> bool:
    """Whether a student holds the weights that training starts from (`train.epochs=0`)."""
    return is_our_student(path) and read_metadata(path).get("steps") == "0"


def load_subject(recipe: Recipe) -> Subject:
    """The chosen student with the teacher's decoder; or a publisher's checkpoint with its own.

    Raises:
        InputError: there is none, it is damaged or was not trained, or it does not fit the decoder.
    """
    path, asked = chosen_student(recipe), recipe.export.name
    if not is_our_student(path):
        sam = load_checkpoint(path)
        name, has_decoder = identify(path)
        whole = sam.image_encoder
        encoder, decoder = _as_asked(whole, recipe), sam if has_decoder else None
        notes = (left_out(sam), _learnt_otherwise(encoder))
        note = "; ".join(filter(None, notes)) or None
        return Subject(name, name, None, encoder, whole, decoder, note, asked, license_of(recipe))
    student = load_student(path)
    if is_untrained(path):
        raise InputError(f"{path} was not trained: it holds the weights that training starts from")
    sam, note = _with_decoder(student, path, recipe) if _has_teacher(recipe) else (None, None)
    if sam is None:
        note = "there is no mask decoder: embeddings alone are compared"
    encoder = _as_asked(student, recipe)
    license = license_of(recipe)
    return Subject(student.config.name, recipe.teacher.name, recipe.name, encoder, student, sam, note, asked, license)


def _learnt_otherwise(encoder: nn.Module) -> str | None:
    """A line for whoever uses a published encoder that reduces images itself: its authors resize them once."""
    if not isinstance(encoder, StudentEncoder) or encoder.img_size == encoder.config.side:
        return None
    side = encoder.config.side
    return f"it was trained on images resized to {side} px at once: export.input=native takes those"


def _as_asked(encoder: nn.Module, recipe: Recipe) -> nn.Module:
    """An encoder that takes what `export.input` says."""
    if recipe.export.input == "native" and isinstance(encoder, StudentEncoder) and encoder.config.input_size:
        return encoder.native()
    return encoder


def _with_decoder(student: StudentEncoder, path: Path, recipe: Recipe) -> tuple[Sam | None, str | None]:
    """A `Sam` around the student, and a line where the decoder is not the one that it learnt for."""
    teacher = recipe.teacher
    if teacher.checkpoint is not None and not inspect_teacher(teacher.checkpoint).has_decoder:
        return None, None
    sam = load_teacher(teacher.name, teacher.checkpoint, student.img_size)
    try:
        return build_student_sam(student, sam), other_teacher(recipe, sam)
    except ValueError as error:
        raise InputError(f"{path} does not fit teacher {teacher.name}: {error}") from error


def _has_teacher(recipe: Recipe) -> bool:
    checkpoint = recipe.teacher.checkpoint
    return recipe.teacher.name == "toy" if checkpoint is None else Path(checkpoint).exists()


def _decoder_expected(recipe: Recipe) -> bool:
    """Whether there will be a decoder, as far as the files tell that are there already."""
    if published := published_checkpoint(recipe):
        return identify(published)[1]
    checkpoint = recipe.teacher.checkpoint
    return _has_teacher(recipe) and (checkpoint is None or inspect_teacher(checkpoint).has_decoder)
