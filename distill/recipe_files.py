"""Recipes as files: where they lie, what they are based on, and their YAML."""

import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from distill.checks import nearest
from students import InputError


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


def with_bases(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe's file and those that it is `based_on`, directly or not, each with what it says; the last base first.

    A base's name and run directory are its own.

    Raises:
        InputError: a base is unknown, or based on what is based on it.
    """
    chain: list[tuple[Path, dict[str, Any]]] = []
    while True:
        if any(path.resolve() == seen.resolve() for seen, _ in chain):
            ring = " → ".join([*(shown_path(seen) for seen, _ in chain), shown_path(path)])
            raise InputError(f"{shown_path(chain[-1][0])}: based_on makes a circle: {ring}")
        content = read_yaml(path)
        base = content.pop("based_on", None)
        if chain:
            content = {key: value for key, value in content.items() if key not in ("name", "run_dir")}
        chain.append((path, content))
        if base is None:
            return chain[::-1]
        path = _find_base(base, path)


def _find_base(base: Any, says: Path) -> Path:
    """The file of a base: a recipe's name, or a path from where the file that says so lies."""
    if not isinstance(base, str):
        raise InputError(f"{shown_path(says)}: based_on={base} is neither a recipe's name nor a path")
    if not base.endswith((".yaml", ".yml")):
        if base not in list_recipes():
            raise InputError(f"{shown_path(says)}: based_on={base} is not known{nearest(base, list_recipes())}")
        return Path(str(files("recipes") / f"{base}.yaml"))
    path = says.parent / Path(base).expanduser()
    if not path.is_file():
        raise InputError(f"{shown_path(says)}: based_on={base}: no such file")
    return path


def shown_path(path: Path) -> str:
    """A path as it is told: from the working directory on, if it lies there."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def read_yaml(path: Path) -> dict[str, Any]:
    """What a recipe's file says; raises `InputError` where it is not a recipe's."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """The same of a text; `origin` is what a mistake is told of."""
    try:
        content = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{origin} is not a recipe: keys and values are expected")
    return content


class Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans, so that `mixed_precision: no` and a date stay text."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))
