"""What several stages need. A line where it is missing, before anything is done."""

from collections.abc import Collection
from pathlib import Path

from distill.recipe import Recipe
from distill.run import chosen_student, refuse_other_settings
from embeddings_cache.images import expand_sources, pick_sources
from embeddings_cache.shards import CacheInfo, read_info
from embeddings_cache.teacher import check_teacher, inspect_teacher
from students import InputError


def need_teacher(recipe: Recipe) -> None:
    """Raise `InputError` unless the recipe's teacher can be loaded."""
    check_teacher(recipe.teacher.name, recipe.teacher.checkpoint, recipe.image_size)


def need_decoder(recipe: Recipe) -> None:
    """Raise `InputError` unless the recipe's teacher can be loaded, and makes masks."""
    need_teacher(recipe)
    checkpoint = recipe.teacher.checkpoint
    if checkpoint and not (found := inspect_teacher(checkpoint)).has_decoder:
        why = f"{checkpoint}: {found.left_out}" if found.left_out else f"{checkpoint} holds an image encoder alone"
        raise InputError(f"{why}: it can teach (stage=precompute, train, export), but masks need a decoder")


def need_student(recipe: Recipe, before: Collection[str]) -> None:
    """Raise `InputError` unless the student to evaluate or export is there, or will be trained before."""
    if recipe.checkpoint is not None or "train" not in before:
        chosen_student(recipe)


def need_images(images: str | list[str], fraction: float) -> None:
    """Raise `InputError` unless the tars and folders to read are there."""
    pick_sources(expand_sources(images), fraction)


def need_own_cache(recipe: Recipe) -> CacheInfo | None:
    """What is known of the recipe's cache, if it was begun; raise `InputError` where a finished one is another's."""
    info = read_info(Path(recipe.cache.dir))
    if info is not None and info.complete:
        refuse_other_settings(recipe, info.identity)
    return info
