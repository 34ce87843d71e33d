"""Convert: a student as a checkpoint that its family's publisher loads, a SAM as one that transformers loads."""

from collections.abc import Collection

from accelerate import Accelerator

from distill.export.handover import check_sam, convert
from distill.needs import need_decoder, need_student
from distill.recipe import Recipe
from distill.run import published_checkpoint


def check(recipe: Recipe, before: Collection[str]) -> None:
    """A student, and a teacher whose decoder goes with it; or a SAM with its own."""
    if sam := published_checkpoint(recipe):
        check_sam(sam)
        return
    need_decoder(recipe)
    need_student(recipe, before)


def run(recipe: Recipe, accelerator: Accelerator) -> bool:
    """`distill.export.handover`; always True."""
    return convert(recipe, accelerator)
