"""Recipes: the dataclasses of `schema.py` say what there is, YAML fills them, `key.sub=value` on the command line
overrides.

A mistake is one `InputError` that names it, where it came from, and the nearest thing that would be right.
"""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.checks import check_recipe, nearest
from distill.recipe_files import Loader, find_recipe, list_recipes, parse_yaml, read_yaml, shown_path, with_bases
from distill.schema import (
    FETCHED,
    ONE_OR_MORE,
    PATHS,
    SHAPES_THE_STUDENT,
    STAGES,
    TEACHER,
    EvaluateRecipe,
    Recipe,
    describe_keys,
    kinds,
)
from embeddings_cache.teacher import inspect_teacher
from students import (
    InputError,
    StudentConfig,
    fetch_from_hub,
    first_line,
    hub_address,
    is_hub_address,
    is_our_student,
    read_metadata,
    student_config_of,
)

__all__ = [
    "STAGES",
    "Recipe",
    "describe_keys",
    "differences",
    "find_recipe",
    "list_recipes",
    "load_recipe",
    "saved_recipe",
    "to_yaml",
]


LISTED = ("train.loss", "student.overrides")
"""Mappings that are taken whole where they are given: what they do not name is not there."""

OF_A_STUDENT = (
    "image_size",
    *(f"student.{entry.name}" for entry in fields(StudentConfig) if entry.name not in ("image_size", "embed_dim")),
)
"""Keys that `student.start` tells where nobody else does."""


def load_recipe(arguments: list[str]) -> Recipe:
    """`["recipe=NAME", "key=value", ...]` → the resolved recipe; a `run_dir` that holds a run brings its own recipe, a
    `checkpoint` to export the one that trained it.

    Raises:
        InputError: no or an unknown recipe, an unknown key, a value of the wrong type or out of range.
    """
    overrides: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise InputError(f"command line: {argument!r} is not key=value (see --help)")
        overrides[key] = os.path.expanduser(value) if key in ("recipe", *PATHS) else value
        if key in FETCHED and "hf://" in value:
            fetched = _each(lambda each: fetch_from_hub(each) if is_hub_address(each) else each, _parse(key, value))
            overrides[key] = fetched if isinstance(fetched, str) else yaml.safe_dump(fetched, default_flow_style=True)
    config, said, asked_for = _from_files(overrides)
    shown = said[-1][0]
    typed = {key: _parse(key, value) for key, value in overrides.items()}
    if "teacher.name" not in typed and (architecture := _architecture(typed.get("teacher.checkpoint"))):
        typed["teacher.name"] = architecture  # or a recipe for ViT-H would refuse mobile_sam.pt
    said.append(("command line", set(overrides)))
    begins = typed.get("student.start", OmegaConf.select(config, "student.start"))
    untold = [key for key in OF_A_STUDENT if _origin(key, said) is None]
    if begins is not None and untold:  # a run's own recipe tells all, and does without the file
        run_dir = typed.get("run_dir") or OmegaConf.select(config, "run_dir")
        keys = _keys_of_student(_here(begins), untold, Path(os.path.expanduser(run_dir)))
        config = _merge(config, _nested(keys), begins)
    config = _merge(config, _nested(typed), "command line", added_to=set(LISTED) - set(typed))
    if _rank("train.warmup_steps", said) > _rank("train.warmup_epochs", said):
        OmegaConf.update(config, "train.warmup_epochs", 0.0)
    if missing := [key for key in asked_for if _origin(key, said) is None]:
        comments = {key: comment for key, _, comment in describe_keys()}
        told = "; ".join(f"{key}=..., {comments[key]}" for key in missing)
        raise InputError(f"{shown} leaves to the command line: {told}")
    try:
        for key in PATHS:
            OmegaConf.update(config, key, _at_home(OmegaConf.select(config, key)))
        for key in FETCHED:
            OmegaConf.update(config, key, _each(_here, OmegaConf.select(config, key)))
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise InputError(f"{shown}: {first_line(error)}") from error
    assert isinstance(recipe, Recipe)
    if _masks_of_prompts(recipe):
        recipe = replace(recipe, evaluate=replace(recipe.evaluate, task="prompts"))
    check_recipe(recipe, lambda key: _origin(key, said) or shown)
    return recipe


def _from_files(overrides: dict[str, str]) -> tuple[Any, list[tuple[str, set[str]]], list[str]]:
    """The schema filled by the recipe's file and those that it is based on, or by the recipe within a checkpoint; which
    of them says which keys; and the keys of which they say `???`, that somebody must. Takes `recipe` from the
    overrides."""
    schema, known = OmegaConf.structured(Recipe), [key for key, _, _ in describe_keys()]
    there = Path(os.path.expanduser(overrides.get("run_dir", ""))) / "recipe.yaml"
    alone = "checkpoint" in overrides and "recipe" not in overrides and not ("run_dir" in overrides and there.is_file())
    if alone and overrides.get("stage") in ("evaluate", "export", "convert", "serve", "publish"):
        named = _parse("checkpoint", overrides["checkpoint"])
        students = [each for each in (named if isinstance(named, list) else [named]) if each != TEACHER]
        within = Path(_here(str(students[0]))) if students else None
        contents = [(str(within or TEACHER), _recipe_within(within))]
    else:
        path = find_recipe(overrides.pop("recipe", "") or _recipe_of(overrides.get("run_dir")))
        OmegaConf.update(schema, "name", path.stem)
        contents = [(shown_path(file), content) for file, content in with_bases(path)]
    config = schema
    said: list[tuple[str, set[str]]] = []
    asked_for: dict[str, None] = {}
    for origin, content in contents:
        config = _merge(config, content, origin)  # which leaves a key with ??? as it is
        flat = dict(_flat(content, known))
        unsaid = [key for key, value in flat.items() if value == "???"]
        asked_for |= dict.fromkeys(unsaid)
        for _, earlier in said:  # what a base says of them is not meant
            earlier.difference_update([key for key in earlier if any(_overlap(key, other) for other in unsaid)])
        said.append((origin, set(flat) - set(unsaid)))
    return config, said, list(asked_for)


def saved_recipe(saved: Path) -> Recipe:
    """A run's recipe.

    Raises:
        InputError: the saved recipe is damaged, or of a version with other keys.
    """
    recipe = OmegaConf.to_object(_merge(OmegaConf.structured(Recipe), read_yaml(saved), str(saved)))
    assert isinstance(recipe, Recipe)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, for all stages, as YAML that `recipe=PATH` takes: without what one command alone was about,
    a photograph, or a zero-shot task and its contestants."""
    whole = replace(recipe, stage="all", image=None, point=None, box=None, repo=None, dry_run=False)
    if recipe.evaluate.task != "masks":
        of_masks = {key: getattr(recipe.evaluate, key) for key in ("masks_per_image", "grid", "clicks")}
        whole = replace(whole, evaluate=EvaluateRecipe(**of_masks), checkpoint=None)
    return OmegaConf.to_yaml(_as_written(whole), resolve=True)


def _as_written(recipe: Recipe) -> Any:
    """A recipe's keys, of files that were fetched from the hub their addresses."""
    config = OmegaConf.structured(recipe)
    for key in FETCHED:
        OmegaConf.update(config, key, _each(lambda path: hub_address(path) or path, OmegaConf.select(config, key)))
    return config


def differences(recipe: Recipe, saved: Path) -> list[str]:
    """`key: earlier value, now value` for every key that shapes the student and differs from a saved recipe.

    Raises:
        InputError: the saved recipe is damaged, or of a version with other keys.
    """
    earlier = OmegaConf.structured(saved_recipe(saved))
    now = _as_written(recipe)
    pairs = ((key, OmegaConf.select(earlier, key), OmegaConf.select(now, key)) for key in SHAPES_THE_STUDENT)
    return [f"{key}: {then}, now {value}" for key, then, value in pairs if then != value]


def _masks_of_prompts(recipe: Recipe) -> bool:
    """Whether masks are asked for of what `evaluate.task=prompts` is for: a file of COCO's or LVIS's, or contestants
    other than one student."""
    data, contestants = recipe.evaluate.data, recipe.checkpoint
    other = (isinstance(contestants, list) and len(contestants) > 1) or contestants in (TEACHER, [TEACHER])
    whole_set = isinstance(data, str) and data.endswith(".json")
    return recipe.stage == "evaluate" and recipe.evaluate.task == "masks" and (whole_set or other)


def _at_home(path: Any) -> Any:
    """A path, or each of a list, with `~` for what it stands for; anything else as it is."""
    return _each(os.path.expanduser, path)


def _each(change: Callable[[str], str], value: Any) -> Any:
    """A text changed, or each of a list; anything else as it is."""
    if isinstance(value, str):
        return change(value)
    return [_each(change, each) for each in value] if isinstance(value, Sequence) else value


def _here(path: str) -> str:
    """A path without `~`, or that of what an address on the hub names. An address from which nothing can be fetched
    stays: not every stage needs the file, and one that does will say why."""
    if not is_hub_address(path):
        return os.path.expanduser(path)
    try:
        return fetch_from_hub(path)
    except InputError:
        return path


def _architecture(checkpoint: str | None) -> str | None:
    """Which teacher a checkpoint holds; None where that cannot be told, which loading it will explain."""
    try:
        return inspect_teacher(checkpoint).name if checkpoint else None
    except InputError:
        return None


def _recipe_within(checkpoint: Path | None) -> dict[str, Any]:
    """The recipe in a student's metadata, or as much of one as it takes to export or evaluate a checkpoint without
    (None: the teacher); results go to the run that the file lies in, else to `runs/` under the file's name.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    if checkpoint is None:
        return {"name": TEACHER, "data": {"images": "scenes:8"}}
    kept: dict[str, Any] = {"name": checkpoint.stem}
    if not checkpoint.exists():
        raise InputError(f"no student at {checkpoint}")
    if is_our_student(checkpoint) and (written := read_metadata(checkpoint).get("recipe")):
        kept = parse_yaml(written, str(checkpoint))
    if not isinstance(data := kept.setdefault("data", {}), dict):
        raise InputError(f"{checkpoint} is not a recipe's: data is {data!r}")
    data.setdefault("images", "scenes:8")
    in_a_run = (checkpoint.parent / "recipe.yaml").is_file() and not hub_address(str(checkpoint))
    beside = checkpoint.parent if in_a_run else Path("runs") / checkpoint.stem
    return {**kept, "run_dir": str(beside)}


def _recipe_of(run_dir: str | None) -> str:
    """The recipe that lies in a run directory."""
    if run_dir and (saved := Path(run_dir) / "recipe.yaml").is_file():
        return str(saved)
    elsewhere = f", and run_dir={run_dir} holds none" if run_dir else ""
    raise InputError(f"command line: recipe=NAME is missing{elsewhere}; recipes: {', '.join(list_recipes())}")


def _parse(key: str, value: str) -> Any:
    """A command line value; where text is expected it stays as it is typed, for YAML would change some of it."""
    if value == "null" or (key in ONE_OR_MORE and not value):
        return None
    if kinds().get(key) == list[str] and not value.startswith("["):
        return value.split(",")
    if kinds().get(key) in (str, str | None) or (key in ONE_OR_MORE and not value.startswith("[")):
        return value
    try:
        return yaml.load(value, Loader)
    except yaml.YAMLError as error:
        raise InputError(f"command line: {key}={value} is not valid YAML: {first_line(error)}") from error


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` → `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
            if not isinstance(branch, dict):
                raise InputError(f"command line: {key} and {section} cannot both be given")
        branch[name] = value
    return tree


def _merge(config: Any, values: dict[str, Any], origin: str, added_to: Collection[str] = ()) -> Any:
    """A config with values in it. Those of `LISTED` that are given replace what was, unless they are `added_to`."""
    known = [key for key, _, _ in describe_keys()]
    for key, _ in _flat(values, known):
        if key not in known:
            raise InputError(f"{origin}: unknown key {key!r}{nearest(key, known)}")
    for key in LISTED:
        if key not in added_to and isinstance(OmegaConf.select(OmegaConf.create(values), key), DictConfig):
            config = OmegaConf.merge(config, {})  # a copy
            OmegaConf.update(config, key, {}, merge=False)
    try:
        return OmegaConf.merge(config, values)
    except OmegaConfBaseException as error:
        name = getattr(error, "full_key", None)
        raise InputError(f"{origin}: {name + ': ' if name else ''}{first_line(error)}") from error


def _flat(values: dict[str, Any], known: list[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` → `("a.b", 1)`, as far as sections are the schema's."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and any(other.startswith(f"{key}.") for other in known):
            yield from _flat(value, known, f"{key}.")
        else:
            yield key, value


def _overlap(key: str, other: str) -> bool:
    """Whether one key is the other, or a section that holds it."""
    return all(mine == theirs for mine, theirs in zip(key.split("."), other.split("."), strict=False))


def _origin(key: str, said: Sequence[tuple[str, set[str]]]) -> str | None:
    """Who said a key last; None where nobody did."""
    rank = _rank(key, said)
    return said[rank][0] if rank >= 0 else None


def _rank(key: str, said: Sequence[tuple[str, set[str]]]) -> int:
    """How late a key was said last; -1 where nobody did."""
    return max(
        (place for place, (_, keys) in enumerate(said) if any(_overlap(key, other) for other in keys)), default=-1
    )


def _keys_of_student(checkpoint: str, wanted: list[str], run_dir: Path) -> dict[str, Any]:
    """Some of `OF_A_STUDENT`, as the student in a checkpoint has them; where that is gone, as a run that began with it
    has."""
    if not Path(checkpoint).exists() and (saved := run_dir / "recipe.yaml").is_file():
        earlier = OmegaConf.structured(saved_recipe(saved))
        if earlier.student.start in (checkpoint, hub_address(checkpoint)):
            return {key: OmegaConf.select(earlier, key) for key in wanted}
    config = asdict(student_config_of(checkpoint))
    return {key: config[key.removeprefix("student.")] for key in wanted}
