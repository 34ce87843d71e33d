"""stage=publish: `export/huggingface/` to a repository on the hub."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from accelerate import Accelerator
from huggingface_hub import constants
from huggingface_hub.utils import HFValidationError, validate_repo_id

from distill.export.files import digest, size
from distill.export.hub.card import UNSAID
from distill.recipe import Recipe
from distill.run import chosen_student, is_whole
from distill.schema import ExportRecipe
from embeddings_cache.system import read_json, sha256
from students import InputError, first_line, unreachable

FOLDER = "huggingface"


def check_publish(recipe: Recipe) -> None:
    """Raise `InputError` unless a repository is named and, if anything shall be sent, there is a token."""
    if recipe.repo is None:
        raise InputError("stage=publish needs repo=OWNER/NAME, where to")
    try:
        validate_repo_id(recipe.repo)
    except HFValidationError as error:
        raise InputError(f"repo={recipe.repo}: {first_line(error)}") from error
    if recipe.repo.count("/") != 1:
        raise InputError(f"repo={recipe.repo} is not OWNER/NAME")
    if not recipe.dry_run and huggingface_hub.get_token() is None:
        raise InputError("stage=publish needs your token: hf auth login, or HF_TOKEN; dry_run=true sends nothing")


def for_publishing(recipe: Recipe) -> Recipe:
    """The recipe of an export of the folder alone; otherwise with the settings of the export that is there, whose files
    shall stay."""
    there = _manifest(recipe).get("made_from", {}).get("export") or {}
    known = {entry.name for entry in fields(ExportRecipe)}
    settings = {key: value for key, value in there.items() if key in known}
    return replace(recipe, export=replace(recipe.export, **{**settings, "formats": [FOLDER]}))


def is_exported(recipe: Recipe) -> bool:
    """Whether the folder is there, whole, and the chosen student's. It may have been edited: a card is for that."""
    content = _manifest(recipe)
    entry = content.get("files", {}).get(FOLDER)
    same = content.get("made_from", {}).get("student_sha256") == sha256(chosen_student(recipe))
    return same and entry is not None and is_whole(Path(recipe.run_dir) / "export" / FOLDER, entry)


def _manifest(recipe: Recipe) -> dict[str, Any]:
    path = Path(recipe.run_dir) / "export" / "manifest.json"
    return read_json(path) if path.exists() else {}


def publish(recipe: Recipe, accelerator: Accelerator) -> None:
    """Say what is sent where, and unless `dry_run` send it: every file of the folder, in one commit.

    Raises:
        InputError: the hub cannot be reached, or does not take it.
    """
    assert recipe.repo is not None
    folder = Path(recipe.run_dir) / "export" / FOLDER
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.parent.name != "__pycache__")
    total = sum(size(file) for file in files)
    kind = "private" if recipe.publish.private else "public"
    doing = "would send" if recipe.dry_run else "sends"
    say = accelerator.print
    where = f"{constants.ENDPOINT}/{recipe.repo}"
    say(f"publish: {doing} {len(files)} files, {total / 1e6:.1f} MB, to {where} ({kind}, if it is new)")
    for file in files:
        say(f"publish: {digest(file)} {size(file):>12,} {file.relative_to(folder).as_posix()}")
    for line in doubts(recipe, folder):
        say(f"publish: {line}")
    if recipe.dry_run:
        return
    if why := unreachable():
        raise InputError(f"stage=publish: {why}")
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(recipe.repo, private=recipe.publish.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=recipe.repo,
            folder_path=folder,
            ignore_patterns=["**/__pycache__/**"],
            commit_message=f"{recipe.name}, by sam-distill",
        )
    except Exception as error:  # requests' or httpx's, as the client's version has it
        raise InputError(f"{where} did not take it: {first_line(error)}") from error
    say(f"publish: {commit.commit_url}")


def doubts(recipe: Recipe, folder: Path) -> list[str]:
    """Lines on what whoever publishes may have overlooked."""
    card, scores = folder / "README.md", Path(recipe.run_dir) / "evaluation.json"
    lines = []
    if UNSAID in card.read_text(encoding="utf-8"):
        lines.append(f"{card} does not say yet under which licence the weights are")
    if scores.exists() and scores.stat().st_mtime > card.stat().st_mtime:
        lines.append(f"{scores} is newer than the card; without {folder} it is written again")
    return lines
