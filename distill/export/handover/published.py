"""stage=convert: the student as a checkpoint that its family's publisher loads."""

from pathlib import Path

import torch
from accelerate import Accelerator

from distill.evaluate.masks import load_sams
from distill.recipe import Recipe
from distill.run import chosen_student, other_teacher
from embeddings_cache.system import whole_file
from students import (
    InputError,
    StudentConfig,
    StudentEncoder,
    architecture_name,
    load_checkpoint,
    load_student,
    save_published,
)


def convert(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Write `export/NAME.pt`, the chosen student with the teacher's prompt encoder and mask decoder.

    NAME is mobile_sam, repvit_sam or edge_sam for a student of their size, whose own code then loads the file, and
    otherwise the student's. Before it gets that name it is read back, and must make equal embeddings.

    Raises:
        InputError: no student, one whose numbers were changed, or a teacher without decoder.
    """
    if accelerator.is_main_process:
        path = chosen_student(recipe)
        student = load_student(path)
        config = student.config
        if config != StudentConfig(config.name, downsample=config.downsample):
            raise InputError(
                f"{path} cannot be converted: published are whole students at 1024 px with 256 channels, not "
                f"{config.image_size} px, {config.embed_dim} channels, overrides {config.overrides}"
            )
        teacher, _ = load_sams(recipe, torch.device("cpu"))
        if line := other_teacher(recipe, teacher):
            accelerator.print(f"convert: {line}")
        written = Path(recipe.run_dir) / "export" / f"{architecture_name(config)}.pt"
        with whole_file(written) as temporary:
            save_published(temporary, student, teacher)
            refuse_other_outputs(student, load_checkpoint(temporary).image_encoder)
        accelerator.print(f"convert: {written}")
    accelerator.wait_for_everyone()
    return True


@torch.no_grad()
def refuse_other_outputs(student: StudentEncoder, converted: torch.nn.Module) -> None:
    """Raise `RuntimeError` unless both make the same of an image."""
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    if not torch.equal(student(image), converted(image)):
        raise RuntimeError("the converted student computes something else")
