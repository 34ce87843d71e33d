"""A run's directory: whose it is, what lies where, and whether what lies there is still current."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from distill.recipe import Recipe, differences, to_yaml
from embeddings_cache.files import read_json, sha256, whole_file
from embeddings_cache.precompute import refuse_other_cache
from embeddings_cache.reader import EmbeddingsCache
from students import InputError


def claim_run_dir(recipe: Recipe) -> None:
    """Make the run directory and put the resolved recipe there.

    Raises:
        InputError: it holds a student, finished or not, of a recipe that trains another one.
    """
    run_dir = Path(recipe.run_dir)
    saved = run_dir / "recipe.yaml"
    if saved.exists() and (trained_student(recipe).exists() or (run_dir / "checkpoints").exists()):
        differing = differences(recipe, saved.read_text(encoding="utf-8"))
        if differing:
            raise InputError(f"{run_dir} holds a run of another recipe: {'; '.join(differing)}. Choose another run_dir")
    if not saved.exists() or saved.read_text(encoding="utf-8") != to_yaml(recipe):
        with whole_file(saved) as temporary:
            temporary.write_text(to_yaml(recipe), encoding="utf-8")


def trained_student(recipe: Recipe) -> Path:
    """Where the run's own student goes."""
    return Path(recipe.run_dir) / "student.safetensors"


def chosen_student(recipe: Recipe) -> Path:
    """The student to evaluate or export: `checkpoint`, or the run's own.

    Raises:
        InputError: it is not there.
    """
    path = Path(recipe.checkpoint) if recipe.checkpoint else trained_student(recipe)
    if not path.is_file():
        hint = "" if recipe.checkpoint else ": run stage=train first"
        raise InputError(f"no student at {path}{hint}")
    return path


def open_cache(recipe: Recipe) -> EmbeddingsCache:
    """The recipe's cache; the teacher's weights are not compared, since training does not need them.

    Raises:
        InputError: there is no finished one, or it was made with other settings.
    """
    cache = EmbeddingsCache(Path(recipe.cache.dir))
    expected = replace(
        cache.info.identity,
        teacher_name=recipe.teacher.name,
        image_size=recipe.image_size,
        dtype=recipe.cache.dtype,
        jpeg_quality=recipe.cache.jpeg_quality,
        data_images=recipe.data.images,
        data_fraction=recipe.data.fraction,
    )
    refuse_other_cache(Path(recipe.cache.dir), cache.info.identity, expected)
    return cache


def made_from(recipe: Recipe, *sections: Any) -> dict[str, Any]:
    """What a result depends on, to be stored in it: the student's weights and the settings given."""
    return {"student_sha256": sha256(chosen_student(recipe)), "settings": list(sections)}


def is_current(result: Path, inputs: dict[str, Any], accelerator: Accelerator) -> bool:
    """Whether a result (JSON) is there, was made from these inputs, and the files that it lists beside it are there.

    All processes get the same answer: none goes on to write before the last has looked.
    """
    current = result.exists() and (content := read_json(result)).get("made_from") == inputs
    current = current and all((result.parent / name).exists() for name in content.get("files", ()))
    accelerator.wait_for_everyone()
    if current:
        accelerator.print(f"{result} is current")
    return current
