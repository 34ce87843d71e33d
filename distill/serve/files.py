"""The files that a run is served from: `RUN/serve/`, proven as any export is, and apart from what is handed over."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from distill.export.folder import export_inputs, write_export
from distill.recipe import Recipe
from distill.run import claim_run_dir, is_current
from embeddings_cache.system import sole_user

FORMATS = ["onnx", "onnx_decoder_batch"]


def served_recipe(recipe: Recipe) -> Recipe:
    """The recipe with what is exported to be served: an encoder of any number of pictures, and a decoder of any number
    of prompts."""
    return replace(recipe, export=replace(recipe.export, formats=list(FORMATS), dynamic_batch=True, input="sam"))


def make_files(recipe: Recipe, accelerator: Accelerator, say: Callable[[str], None]) -> Path:
    """The folder with the files, which are made unless they are current. Only while they are made is the run's
    directory held, so that several servers share it.

    Raises:
        InputError: no student, none that can be served, or another run is at work in the directory.
        ParityError: a file does not do what the student does.
    """
    folder, served = Path(recipe.run_dir) / "serve", served_recipe(recipe)
    inputs = {**export_inputs(served), "evaluation": None}  # which nobody reads of here
    if not is_current(folder / "manifest.json", inputs, accelerator):
        with sole_user(Path(recipe.run_dir)):
            claim_run_dir(recipe)
            write_export(served, folder, inputs, say, timed=False)
    return folder
