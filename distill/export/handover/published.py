"""stage=convert: a student as a checkpoint that its family's publisher loads, a SAM as one that transformers loads."""

from pathlib import Path

import torch
from accelerate import Accelerator

from distill.evaluate.masks import load_sams
from distill.export.files import whole_directory
from distill.recipe import Recipe
from distill.run import chosen_student, other_teacher, published_checkpoint
from embeddings_cache.system import whole_file
from students import (
    VITS,
    InputError,
    StudentEncoder,
    inspect_checkpoint,
    load_checkpoint,
    load_student,
    published_name,
    save_hugging_face,
    save_published,
)


def convert(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Write the chosen checkpoint in another layout below `export/`, `convert_student`'s or `convert_sam`'s.

    Raises:
        InputError: there is none, or no other layout has a place for it.
    """
    if accelerator.is_main_process:
        sam = published_checkpoint(recipe)
        written = convert_sam(recipe, sam) if sam else convert_student(recipe, accelerator)
        accelerator.print(f"convert: {written}")
    accelerator.wait_for_everyone()
    return True


def convert_student(recipe: Recipe, accelerator: Accelerator) -> Path:
    """Write `export/NAME.pt`, the chosen student with the teacher's prompt encoder and mask decoder.

    NAME is its publisher's (mobile_sam, repvit_sam, edge_sam, efficientvit_sam_l0, ...) for a student of their size,
    whose own code then loads the file, and otherwise the student's. Before it gets that name it is read back, and must
    make equal embeddings.

    Raises:
        InputError: no student, one whose numbers were changed, or a teacher without decoder.
    """
    path = chosen_student(recipe)
    student = load_student(path)
    config = student.config
    name = published_name(config)
    if name is None:
        raise InputError(
            f"{path} cannot be converted: published are whole students at 1024 px with 256 channels, not "
            f"{config.name} of {config.image_size} px, {config.embed_dim} channels, neck={config.neck} of depth "
            f"{config.neck_depth}, input_size {config.side}, overrides {config.overrides}"
        )
    teacher, _ = load_sams(recipe, torch.device("cpu"))
    if line := other_teacher(recipe, teacher):
        accelerator.print(f"convert: {line}")
    written = Path(recipe.run_dir) / "export" / f"{name}.pt"
    with whole_file(written) as temporary:
        save_published(temporary, student, teacher)
        refuse_other_outputs(student, load_checkpoint(temporary).image_encoder)
    return written


def convert_sam(recipe: Recipe, path: Path) -> Path:
    """Write `export/NAME-transformers/`, a ViT SAM with its own decoder, as transformers' `SamModel.from_pretrained`
    takes it. Before the directory gets that name it is read back, and must hold equal weights.

    Raises:
        InputError: as `check_sam`.
    """
    check_sam(path)
    sam = load_checkpoint(path)
    written = Path(recipe.run_dir) / "export" / f"{inspect_checkpoint(path).name}-transformers"
    with whole_directory(written) as temporary:
        save_hugging_face(temporary, sam)
        found = load_checkpoint(temporary).state_dict()
        if not all(torch.equal(tensor, found[name]) for name, tensor in sam.state_dict().items()):
            raise RuntimeError("the converted SAM holds other weights")
    return written


def check_sam(path: Path) -> None:
    """Raise `InputError` unless a checkpoint holds one of segment-anything's encoders and its decoder."""
    found = inspect_checkpoint(path)
    if found.name not in VITS:
        raise InputError(
            f"{path} cannot be converted: {found.name} is in its publisher's layout, and transformers' SamModel takes "
            f"{', '.join(VITS)} alone"
        )
    if not found.has_decoder:
        raise InputError(f"{path} cannot be converted: {found.left_out or 'it holds an image encoder alone'}")


@torch.no_grad()
def refuse_other_outputs(student: StudentEncoder, converted: torch.nn.Module) -> None:
    """Raise `RuntimeError` unless both make the same of an image."""
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    if not torch.equal(student(image), converted(image)):
        raise RuntimeError("the converted student computes something else")
