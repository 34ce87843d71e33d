"""Train: the student learns the cache."""

import os
from collections.abc import Collection

import torch
from accelerate import Accelerator

from distill.needs import need_own_cache, need_teacher
from distill.recipe import Recipe
from distill.run import open_cache, trained_student
from distill.train import student_config, train
from distill.training.metrics import check_trackers
from distill.training.plan import check_batch, wants_masks
from students import build_encoder, check_pretrained


def check(recipe: Recipe, before: Collection[str]) -> None:
    """A cache of this recipe's and, unless the student is there, all that it takes to train one."""
    need_own_cache(recipe)
    if trained_student(recipe).exists():
        return
    check_batch(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    check_trackers(recipe)
    if wants_masks(recipe):
        need_teacher(recipe)
    pretrained = recipe.student.pretrained
    if pretrained is True:
        check_pretrained(recipe.student.name)
    from_file = isinstance(pretrained, str)
    with torch.device("cpu" if from_file else "meta"):
        build_encoder(student_config(recipe), pretrained if from_file else False)
    if "precompute" not in before:
        open_cache(recipe, partly=recipe.cache.per_node)


def run(recipe: Recipe, accelerator: Accelerator) -> bool:
    """`distill.train`; returns False where the student was there."""
    return train(recipe, accelerator)
