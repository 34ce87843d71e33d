"""Serve: the student as a service, until it is told to stop."""

import os
from collections.abc import Collection
from importlib.util import find_spec

from accelerate import Accelerator

from distill.export.subject import check_formats
from distill.needs import need_student
from distill.recipe import Recipe
from students import InputError

NEEDED = ("starlette", "uvicorn", "prometheus_client", "msgspec", "contourpy")


def check(recipe: Recipe, before: Collection[str]) -> None:
    """A student with a decoder, the libraries, one process, and a token where others can reach the port."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(f"stage=serve needs {', '.join(missing)}: pip install '.[serve]' where it was cloned")
    from distill.serve.files import served_recipe
    from distill.serve.token import token_of

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("stage=serve is one process: python distill.py stage=serve ..., without accelerate launch")
    token_of(recipe)
    check_formats(served_recipe(recipe))
    need_student(recipe, before)


def run(recipe: Recipe, accelerator: Accelerator) -> bool:
    """`distill.serve.start`; always True, once the server was told to stop."""
    from distill.serve.start import serve

    return serve(recipe, accelerator)
