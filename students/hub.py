"""Checkpoints on the Hugging Face hub, by addresses `hf://OWNER/NAME/FILE[@REVISION]`.

A file is fetched once into the hub's own cache, and used from there, also without a network. There it lies under its
commit, so that an address can be told from the path that it was fetched to, and tells one content for good.
"""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from students.errors import InputError, first_line

SCHEME = "hf://"

ADDRESS = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<branch>[^/]+))?/(?P<file>[^@]+?)(@(?P<revision>.+))?")
"""A revision stands behind the file or, as the hub's own file system has it, behind the name."""

COMMIT = re.compile("[0-9a-f]{40}")

OTHERS = ("datasets/", "spaces/")
"""What addresses of repositories begin with that hold no models."""

LOG_IN = "log in (hf auth login), or set HF_TOKEN"


def is_hub_address(text: object) -> bool:
    """Whether a value names a file on the hub."""
    return isinstance(text, str) and text.startswith(SCHEME)


def fetch_from_hub(address: str) -> str:
    """The path of a file in the hub's cache, where it is fetched to if it is not there.

    Raises:
        InputError: it is no address, there is no such file, it may not be had, or neither the cache nor the hub has it.
    """
    repo, file, revision = _parts(address)
    if ".." in file.split("/"):
        raise InputError(f"{address} is not hf://OWNER/NAME/FILE, with @REVISION or without")
    if revision and COMMIT.fullmatch(revision):
        cached = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(cached, str):
            return cached
    why_not = unreachable()
    try:
        return str(huggingface_hub.hf_hub_download(repo, file, revision=revision, local_files_only=why_not is not None))
    except GatedRepoError as error:
        raise InputError(f"{address}: {repo} is gated: ask for access on its page, and {LOG_IN}") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{address}: there is no {repo} on the hub; where it is private, {LOG_IN}") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{address}: {repo} has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        raise InputError(f"{address} is not in the hub's cache, and {why_not or first_line(error)}") from error
    except EntryNotFoundError as error:
        raise InputError(f"{address}: {repo} has no file {file}" + (f" at {revision}" if revision else "")) from error
    except HFValidationError as error:
        raise InputError(f"{address}: {first_line(error)}") from error
    except OSError as error:
        if error.errno is not None:  # a disk that is full, say
            raise
        raise InputError(f"{address} cannot be fetched: {first_line(error)}") from error
    except Exception as error:  # requests' or httpx's, as the client's version has it
        raise InputError(f"{address} cannot be fetched: {first_line(error)}") from error


def unreachable() -> str | None:
    """Why the hub cannot be asked, None where it answers; its own client tries for half a minute, aloud."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # requests' or httpx's, as the client's version has it
        return f"{constants.ENDPOINT} does not answer ({first_line(error)})"
    return None


def hub_address(path: str) -> str | None:
    """The address, with its commit, of a path that `fetch_from_hub` returned; None of any other."""
    try:
        place = Path(path).relative_to(constants.HF_HUB_CACHE)
    except ValueError:
        return None
    match place.parts:
        case (folder, "snapshots", commit, *file) if folder.count("--") == 2 and file:
            return f"{SCHEME}{folder.removeprefix('models--').replace('--', '/')}/{'/'.join(file)}@{commit}"
    return None


def _parts(address: str) -> tuple[str, str, str | None]:
    """Repository, file and revision of an address."""
    found = ADDRESS.fullmatch(address)
    if found is None or address.removeprefix(SCHEME).startswith(OTHERS):
        raise InputError(f"{address} is not hf://OWNER/NAME/FILE, with @REVISION or without")
    if found["file"].endswith(".index.json"):
        raise InputError(f"{address} names the parts of a checkpoint: download the repository, and give its folder")
    return found["repo"], found["file"], found["revision"] or found["branch"]
