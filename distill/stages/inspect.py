"""Inspect: what lies in `data.images`, without a teacher."""

from collections.abc import Collection

from accelerate import Accelerator

from distill.inspection import inspect
from distill.needs import need_images
from distill.reading import annotations_of
from distill.recipe import Recipe
from embeddings_cache.images import scene_count
from students import InputError


def check(recipe: Recipe, before: Collection[str]) -> None:
    """Images that were not made by us."""
    if scene_count(recipe.data.images):
        raise InputError(f"stage=inspect looks at photographs; data.images={recipe.data.images} are generated")
    need_images(recipe.data.images, recipe.data.fraction)
    annotations_of(recipe)


def run(recipe: Recipe, accelerator: Accelerator) -> bool:
    """`distill.inspection` on the main process; always True."""
    if accelerator.is_main_process:
        inspect(recipe, accelerator)
    accelerator.wait_for_everyone()
    return True
