"""A stage is a file here, with two functions beside each other; `STAGES` and `ON_REQUEST` of `schema.py` name them.

check(recipe, before)       says what is missing, before anything is done
run(recipe, accelerator)    does what is missing
"""

from collections.abc import Collection
from importlib import import_module
from typing import Protocol, cast

from accelerate import Accelerator

from distill.recipe import Recipe


class Stage(Protocol):
    """What every file here has."""

    def check(self, recipe: Recipe, before: Collection[str]) -> None:
        """Refuse what is known to fail. Reads, and writes nothing.

        Args:
            recipe: as it will run.
            before: names of the stages that will have run by then: what one of them makes is not missing yet.

        Raises:
            InputError: something is missing, or does not fit.
        """

    def run(self, recipe: Recipe, accelerator: Accelerator) -> bool:
        """Do what is not there yet; every process of the launch calls this.

        Returns:
            False where there was nothing to do.
        """


def find_stage(name: str) -> Stage:
    """The stage of a name, with whatever it needs, which for some takes seconds to load."""
    return cast(Stage, import_module(f"{__name__}.{name}"))
