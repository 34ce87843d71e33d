"""Evaluate: what the student is worth."""

from collections.abc import Collection

from accelerate import Accelerator

from distill.evaluate.masks import evaluate_masks
from distill.evaluate.suite import check_task, evaluate_task
from distill.needs import need_decoder, need_images, need_student
from distill.recipe import Recipe


def check(recipe: Recipe, before: Collection[str]) -> None:
    """A student, a teacher with a decoder, and the images of `evaluate.data`."""
    if recipe.evaluate.task != "masks":
        if check_task(recipe):
            need_decoder(recipe)
        return
    need_decoder(recipe)
    need_student(recipe, before)
    if recipe.evaluate.data is not None:
        need_images(recipe.evaluate.data, 1.0)


def run(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Do the recipe's task; returns False where its result was there."""
    evaluate = evaluate_masks if recipe.evaluate.task == "masks" else evaluate_task
    return evaluate(recipe, accelerator)
