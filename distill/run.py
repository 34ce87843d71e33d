"""A run's directory: whose it is, what lies where, and whether what lies there is still current."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from segment_anything.modeling import Sam

from distill.recipe import Recipe, differences, saved_recipe, to_yaml
from distill.schema import TASKS, TEACHER
from embeddings_cache.images import fingerprint
from embeddings_cache.shards import CacheIdentity, EmbeddingsCache, identity_of, images_name, refuse_other_cache
from embeddings_cache.system import read_json, whole_file, write_json
from embeddings_cache.teacher import weights_sha256
from students import InputError, fetch_from_hub, is_hub_address, is_our_student, read_metadata


def claim_run_dir(recipe: Recipe) -> None:
    """Make the run directory and put the resolved recipe there, unless it has the recipe of its student already.

    Raises:
        InputError: it holds a student, finished or not, of a recipe that trains another one.
    """
    run_dir = Path(recipe.run_dir)
    saved = run_dir / "recipe.yaml"
    if saved.exists() and has_begun(recipe):
        if differing := differences(recipe, saved):
            raise InputError(f"{run_dir} holds a run of another recipe: {'; '.join(differing)}. Choose another run_dir")
        return
    with whole_file(saved) as temporary:
        temporary.write_text(to_yaml(recipe), encoding="utf-8")


def bind_cache(recipe: Recipe, identity: CacheIdentity) -> None:
    """Note beside the student which cache it learns from, `cache.json`.

    Raises:
        InputError: it has learnt from another one, say from another teacher's weights.
    """
    note = Path(recipe.run_dir) / "cache.json"
    if note.exists() and has_begun(recipe):
        differing = identity_of(read_json(note)).differences(identity)
        if differing:
            raise InputError(
                f"{recipe.run_dir} learnt from another cache: {'; '.join(differing)}. Choose another run_dir"
            )
        return
    write_json(note, asdict(identity))


def has_begun(recipe: Recipe) -> bool:
    """Whether the run directory holds a student, finished or not."""
    return trained_student(recipe).exists() or checkpoints_of(recipe).exists()


def begun_recipe(recipe: Recipe) -> Recipe | None:
    """What the run directory's student, finished or not, is trained by; None where there is none.

    Raises:
        InputError: the saved recipe is damaged, or of a version with other keys.
    """
    saved = Path(recipe.run_dir) / "recipe.yaml"
    return saved_recipe(saved) if saved.exists() and has_begun(recipe) else None


def checkpoints_of(recipe: Recipe) -> Path:
    """Where the run's checkpoints go."""
    return Path(recipe.run_dir) / "checkpoints"


def finished_checkpoints(directory: Path) -> list[Path]:
    """Those that are whole, oldest first."""
    return sorted(directory.glob("step-*"))


def trained_student(recipe: Recipe) -> Path:
    """Where the run's own student goes."""
    return Path(recipe.run_dir) / "student.safetensors"


def chosen_student(recipe: Recipe) -> Path:
    """The student to evaluate or export: `checkpoint`, or the run's own.

    Raises:
        InputError: it is not there, or the teacher.
    """
    (path,) = chosen_students(recipe)
    if path is None:
        raise InputError(f"checkpoint={TEACHER}: stage={recipe.stage} takes a student")
    return path


def published_checkpoint(recipe: Recipe) -> Path | None:
    """The chosen checkpoint, where it is there and no student of ours."""
    path = Path(recipe.checkpoint) if recipe.checkpoint else None
    return path if path is not None and path.exists() and not is_our_student(path) else None


def chosen_students(recipe: Recipe) -> list[Path | None]:
    """All that `checkpoint` names, or the run's own; None is the teacher.

    Raises:
        InputError: one of them is not there.
    """
    named = recipe.checkpoint if isinstance(recipe.checkpoint, list) else [recipe.checkpoint or trained_student(recipe)]
    # What could be fetched goes by its path; the others will be told why not.
    here = [fetch_from_hub(str(name)) if is_hub_address(name) else name for name in named]
    chosen = [None if name == TEACHER else Path(name) for name in here]
    for path in chosen:
        if path is not None and not path.exists():
            hint = "" if recipe.checkpoint else ": run stage=train first"
            raise InputError(f"no student at {path}{hint}")
    return chosen


def other_teacher(recipe: Recipe, teacher: Sam) -> str | None:
    """A line for whoever uses the chosen student with a teacher's decoder that is not the one that it learnt for."""
    learnt_from = read_metadata(chosen_student(recipe)).get("teacher_sha256")
    if learnt_from in (None, weights_sha256(teacher)):
        return None
    return f"the student learnt from other weights than this {recipe.teacher.name}'s: masks may be poor"


def open_cache(recipe: Recipe, partly: bool = False) -> EmbeddingsCache:
    """The recipe's cache, or with `partly` what this machine has of it; the teacher's weights are not compared, since
    training does not need them.

    Raises:
        InputError: there is no finished one, or it was made with other settings.
    """
    cache = EmbeddingsCache(Path(recipe.cache.dir), partly)
    refuse_other_settings(recipe, cache.info.identity)
    return cache


def refuse_other_settings(recipe: Recipe, identity: CacheIdentity) -> None:
    """Raise `InputError`, naming what differs, unless a cache was made with the recipe's settings."""
    expected = replace(
        identity,
        teacher_name=recipe.teacher.name,
        image_size=recipe.image_size,
        dtype=recipe.cache.dtype,
        jpeg_quality=recipe.cache.jpeg_quality,
        preprocess=fingerprint(recipe.data.sixteen_bit),
        data_images=images_name(recipe.data.images),
        data_fraction=recipe.data.fraction,
        data_annotations=recipe.data.annotations or "",
    )
    refuse_other_cache(Path(recipe.cache.dir), identity, expected)
    cells = recipe.image_size // 16
    if identity.embedding_shape[1:] != (cells, cells):
        raise InputError(
            f"the cache at {recipe.cache.dir} has embeddings of {' × '.join(map(str, identity.embedding_shape))}; "
            f"students at {recipe.image_size} px make {cells} × {cells} cells"
        )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; none where there is no such file. A last line that a crash cut off is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def note_time(recipe: Recipe, stage: str, seconds: float, finished: bool) -> None:
    """Keep in `stages.json` how long a stage took; what an interrupted one took before is added to it."""
    path = Path(recipe.run_dir) / "stages.json"
    times = stage_times(recipe)
    earlier = times.get(stage, {"seconds": 0.0, "finished": True})
    if earlier["finished"] and not finished and stage in times:
        return  # a second attempt at what is there, and it came to nothing
    total = seconds if earlier["finished"] else seconds + earlier["seconds"]
    write_json(path, {**times, stage: {"seconds": round(total, 1), "finished": finished}})


def stage_times(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What `note_time` has kept: seconds, and whether they led to the stage's end."""
    path = Path(recipe.run_dir) / "stages.json"
    return read_json(path) if path.exists() else {}


def as_stored(value: Any) -> Any:
    """A value as it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(value))


def is_current(result: Path, inputs: dict[str, Any], accelerator: Accelerator, section: str | None = None) -> bool:
    """Whether a result (JSON, or a section of it) is there, was made from these inputs, and the files that it lists
    beside it are there.

    All processes get the same answer: none goes on to write before the last has looked.
    """
    content = (read_section(result, section) if section else read_json(result)) if result.exists() else None
    content = content or {}
    current = content.get("made_from") == as_stored(inputs)
    listed = content.get("files", {})
    described = listed if isinstance(listed, dict) else {name: {} for name in listed}
    described = {**described, **content.get("beside", {})}
    current = current and all(is_whole(result.parent / name, entry) for name, entry in described.items())
    accelerator.wait_for_everyone()
    if current:
        accelerator.print(f"{result} is current" + (f" for {section}" if section else ""))
    return current


def is_whole(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a file of a manifest is there; of a folder, whether all of its `contents` are."""
    return path.exists() and all((path / name).exists() for name in entry.get("contents", ()))


def read_section(path: Path, name: str) -> dict[str, Any] | None:
    """What `evaluation.json` says of a task; None where it says nothing, or there is no such file."""
    content = read_json(path) if path.exists() else {}
    found = content.get(name) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else None


def write_section(path: Path, name: str, section: dict[str, Any]) -> None:
    """Put what a task came to into `evaluation.json`, beside what others did."""
    others = {task: found for task in TASKS if task != name and (found := read_section(path, task))}
    write_json(path, {task: {**others, name: section}[task] for task in TASKS if task in {*others, name}})
