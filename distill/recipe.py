"""Recipes: the dataclasses of `schema.py` say what there is, YAML fills them, `key.sub=value` on the command line
overrides.

A mistake is one `InputError` that names it, where it came from, and the nearest thing that would be right.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.checks import check_recipe, nearest
from distill.schema import IMAGES, PATHS, SHAPES_THE_STUDENT, STAGES, Recipe, describe_keys, kinds
from students import InputError, architecture_of, first_line, is_our_student, read_metadata

__all__ = ["STAGES", "Recipe", "describe_keys", "differences", "find_recipe", "list_recipes", "load_recipe", "to_yaml"]


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
    schema = OmegaConf.structured(Recipe)
    alone = "checkpoint" in overrides and not {"recipe", "run_dir"} & set(overrides)
    if alone and overrides.get("stage") in ("export", "convert"):
        shown = overrides["checkpoint"]
        config = _merge(schema, _recipe_within(Path(shown)), shown)
    else:
        if "recipe" not in overrides:
            overrides["recipe"] = _recipe_of(overrides.get("run_dir"))
        path = find_recipe(overrides.pop("recipe"))
        shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
        OmegaConf.update(schema, "name", path.stem)
        config = _merge(schema, _read_yaml(path), shown)
    typed = {key: _parse(key, value) for key, value in overrides.items()}
    if "teacher.name" not in typed and (brought := _architecture(typed.get("teacher.checkpoint"))):
        typed["teacher.name"] = brought  # or a recipe for ViT-H would refuse mobile_sam.pt
    config = _merge(config, _nested(typed), "command line")
    try:
        for key in PATHS:
            OmegaConf.update(config, key, _at_home(OmegaConf.select(config, key)))
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise InputError(f"{shown}: {first_line(error)}") from error
    assert isinstance(recipe, Recipe)
    typed_here = [key.split(".") for key in overrides]
    check_recipe(recipe, lambda key: "command line" if any(_overlap(key.split("."), o) for o in typed_here) else shown)
    return recipe


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in files("recipes").iterdir() if entry.name.endswith("yaml")
    )


def find_recipe(name: str) -> Path:
    """A recipe's file, by name or path.

    Raises:
        InputError: there is none.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise InputError(f"command line: recipe={name}: no such file")
        return Path(name)
    if name not in list_recipes():
        raise InputError(f"command line: unknown recipe {name!r}{nearest(name, list_recipes())}")
    return Path(str(files("recipes") / f"{name}.yaml"))


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, for all stages, as YAML that `recipe=PATH` takes."""
    whole = replace(recipe, stage="all", image=None, point=None, box=None)
    return OmegaConf.to_yaml(OmegaConf.structured(whole), resolve=True)


def differences(recipe: Recipe, saved: Path) -> list[str]:
    """`key: earlier value, now value` for every key that shapes the student and differs from a saved recipe.

    Raises:
        InputError: the saved recipe is damaged, or of a version with other keys.
    """
    earlier = _merge(OmegaConf.structured(Recipe), _read_yaml(saved), str(saved))
    now = OmegaConf.structured(recipe)
    pairs = ((key, OmegaConf.select(earlier, key), OmegaConf.select(now, key)) for key in SHAPES_THE_STUDENT)
    return [f"{key}: {then}, now {value}" for key, then, value in pairs if then != value]


def _at_home(path: Any) -> Any:
    """A path, or each of a list, with `~` for what it stands for; anything else as it is."""
    if isinstance(path, str):
        return os.path.expanduser(path)
    return [_at_home(each) for each in path] if isinstance(path, Sequence) else path


def _architecture(checkpoint: str | None) -> str | None:
    """Which teacher a checkpoint holds; None where that cannot be told, which loading it will explain."""
    try:
        return architecture_of(Path(checkpoint)) if checkpoint else None
    except InputError:
        return None


def _recipe_within(checkpoint: Path) -> dict[str, Any]:
    """The recipe in a student's metadata, or as much of one as it takes to export a checkpoint without; results go to
    the run that the file lies in, else to `runs/` under the file's name.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    kept: dict[str, Any] = {"name": checkpoint.stem}
    if not checkpoint.exists():
        raise InputError(f"no student at {checkpoint}")
    if is_our_student(checkpoint) and (written := read_metadata(checkpoint).get("recipe")):
        kept = _parse_yaml(written, str(checkpoint))
    if not isinstance(data := kept.setdefault("data", {}), dict):
        raise InputError(f"{checkpoint} is not a recipe's: data is {data!r}")
    data.setdefault("images", "scenes:8")
    beside = checkpoint.parent if (checkpoint.parent / "recipe.yaml").is_file() else Path("runs") / checkpoint.stem
    return {**kept, "run_dir": str(beside)}


def _recipe_of(run_dir: str | None) -> str:
    """The recipe that lies in a run directory."""
    if run_dir and (saved := Path(run_dir) / "recipe.yaml").is_file():
        return str(saved)
    elsewhere = f", and run_dir={run_dir} holds none" if run_dir else ""
    raise InputError(f"command line: recipe=NAME is missing{elsewhere}; recipes: {', '.join(list_recipes())}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, origin: str) -> dict[str, Any]:
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{origin} is not a recipe: keys and values are expected")
    return content


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans, so that `mixed_precision: no` and a date stay text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))


def _parse(key: str, value: str) -> Any:
    """A command line value; where text is expected it stays as it is typed, for YAML would change some of it."""
    if value == "null" or (key in IMAGES and not value):
        return None
    if kinds().get(key) == list[str] and not value.startswith("["):
        return value.split(",")
    if kinds().get(key) in (str, str | None) or (key in IMAGES and not value.startswith("[")):
        return value
    try:
        return yaml.load(value, _Loader)
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


def _merge(config: Any, values: dict[str, Any], origin: str) -> Any:
    known = [key for key, _, _ in describe_keys()]
    for key in _flat_keys(values, known):
        if key not in known:
            raise InputError(f"{origin}: unknown key {key!r}{nearest(key, known)}")
    try:
        return OmegaConf.merge(config, values)
    except OmegaConfBaseException as error:
        name = getattr(error, "full_key", None)
        raise InputError(f"{origin}: {name + ': ' if name else ''}{first_line(error)}") from error


def _flat_keys(values: dict[str, Any], known: list[str], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and any(other.startswith(f"{key}.") for other in known):
            yield from _flat_keys(value, known, f"{key}.")
        else:
            yield key


def _overlap(key: list[str], other: list[str]) -> bool:
    """Whether one key is the other, or a section that holds it."""
    return all(mine == theirs for mine, theirs in zip(key, other, strict=False))
