"""How a recipe's pictures are read, and what is known of them besides what lies beside each."""

from functools import cache
from pathlib import Path

from distill.recipe import Recipe
from embeddings_cache.images import CocoFile, Reading


def reading_of(recipe: Recipe) -> Reading:
    """What `data.max_pixels` and `data.sixteen_bit` say."""
    return Reading(recipe.data.max_pixels, recipe.data.sixteen_bit)


def annotations_of(recipe: Recipe) -> CocoFile | None:
    """What `data.annotations` says; None where there is no such file.

    Raises:
        InputError: it is not COCO's instances.
    """
    return _coco(recipe.data.annotations) if recipe.data.annotations else None


@cache
def _coco(path: str) -> CocoFile:
    """Read once: it may have gigabytes."""
    return CocoFile(Path(path))
