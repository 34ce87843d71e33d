"""`web/`: what the page needs beside its scripts and the ONNX files: what they are, an example, and ONNX Runtime."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from distill.export.runtime import FILES, browser_runtime
from distill.schema import PredictRecipe
from embeddings_cache.images import PIXEL_MEAN, generate_scene
from embeddings_cache.system import write_json
from students import InputError

ENCODERS = {"float32": "encoder.onnx", "float16": "encoder_fp16.onnx"}
DECODER = "decoder_batch.onnx"

EXAMPLE_SEED = (25, 51)
"""Scenes to learn from have a first number of 0, unless a recipe says otherwise: this one is not among them."""

EXAMPLE_SIDE = 640


def out_of_reach(say: Callable[[str], None]) -> str | None:
    """Why ONNX Runtime for browsers cannot be had, where it cannot; it is downloaded if need be."""
    try:
        browser_runtime(say)
    except InputError as error:
        return f"web: {error}"
    return None


def complete_page(
    folder: Path, facts: dict[str, str | int], input_size: int, settings: PredictRecipe, say: Callable[[str], None]
) -> None:
    """Put into a page's folder what is not a text of the project.

    Args:
        folder: with the page's scripts and ONNX files.
        facts: as `write_client` takes them.
        input_size: longest side in pixels of the images that the encoder takes.
        settings: the grid, and which of its masks are kept.
        say: told what is downloaded.

    Raises:
        InputError: ONNX Runtime is not to be had.
    """
    model = {
        "name": facts["name"],
        "title": facts["title"],
        "fingerprint": facts["fingerprint"],
        "image_size": facts["size"],
        "input_size": input_size,
        "mean": list(PIXEL_MEAN),
        "encoders": ENCODERS,
        "decoder": DECODER,
        "everything": vars(settings),
    }
    write_json(folder / "model.json", model)
    scene, _ = generate_scene(np.random.default_rng(EXAMPLE_SEED), EXAMPLE_SIDE)
    Image.fromarray(scene).save(folder / "example.png")
    runtime = browser_runtime(say)
    for name in FILES:
        shutil.copyfile(runtime / name, folder / name)
