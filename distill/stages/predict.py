"""Predict: the student on one photograph."""

from collections.abc import Collection

from accelerate import Accelerator

from distill.needs import need_decoder, need_student
from distill.predict import predict, prompts_within, read_photograph
from distill.recipe import Recipe


def check(recipe: Recipe, before: Collection[str]) -> None:
    """A student, a teacher with a decoder, a photograph, and prompts within it."""
    need_decoder(recipe)
    prompts_within(recipe, read_photograph(recipe))
    need_student(recipe, before)


def run(recipe: Recipe, accelerator: Accelerator) -> bool:
    """`distill.predict`; always True."""
    return predict(recipe, accelerator)
