"""Publish: the student and its model card to a repository on the Hugging Face hub."""

from collections.abc import Collection

from accelerate import Accelerator

from distill.export.folder import export
from distill.export.hub import check_publish, for_publishing, is_exported, publish
from distill.export.subject import check_formats
from distill.needs import need_student
from distill.recipe import Recipe


def check(recipe: Recipe, before: Collection[str]) -> None:
    """A repository, the user's token, and a student whose folder is there or can be made."""
    check_publish(recipe)
    need_student(recipe, before)
    if not is_exported(recipe):
        check_formats(for_publishing(recipe))


def run(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Make `export/huggingface/` if it is not there, and send it; always True."""
    if not is_exported(recipe):
        export(for_publishing(recipe), accelerator)
    if accelerator.is_main_process:
        publish(recipe, accelerator)
    accelerator.wait_for_everyone()
    return True
