"""Train: the student learns the cache."""

import os
from collections.abc import Collection

from accelerate import Accelerator

from distill.needs import need_decoder, need_own_cache
from distill.recipe import Recipe
from distill.run import open_cache, trained_student
from distill.student import check_student
from distill.train import train
from distill.training.metrics import check_trackers
from distill.training.plan import check_batch, wants_masks


def check(recipe: Recipe, before: Collection[str]) -> None:
    """A cache of this recipe's and, unless the student is there, all that it takes to train one."""
    info = need_own_cache(recipe)
    if trained_student(recipe).exists():
        return
    check_batch(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    check_trackers(recipe)
    if wants_masks(recipe):
        need_decoder(recipe)
    check_student(recipe, info.identity.embedding_shape[0] if info else None)
    if "precompute" not in before:
        open_cache(recipe, partly=recipe.cache.per_node)


def run(recipe: Recipe, accelerator: Accelerator) -> bool:
    """`distill.train`; returns False where the student was there."""
    return train(recipe, accelerator)
