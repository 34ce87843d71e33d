"""Export: the student in other runtimes' formats."""

from collections.abc import Collection

from accelerate import Accelerator

from distill.export.folder import export
from distill.export.subject import check_formats
from distill.needs import need_student
from distill.recipe import Recipe


def check(recipe: Recipe, before: Collection[str]) -> None:
    """A student, and what the formats need."""
    check_formats(recipe)
    need_student(recipe, before)


def run(recipe: Recipe, accelerator: Accelerator) -> bool:
    """`distill.export`; returns False where all files were there."""
    return export(recipe, accelerator)
