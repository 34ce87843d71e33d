"""What others' programs need of a student: the folders that exports make for CVAT and labelling tools.

A folder here is a tool's. Its files go beside the ONNX files as they are, those that end in `.jinja` filled in, and
what several import with those that do.
"""

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from jinja2 import Environment, StrictUndefined

SHARED = {"segmenter.py": "from segmenter import", "web/resize.mjs": '"./resize.mjs"', "web/png.mjs": '"./png.mjs"'}
"""Files of this package that go into several folders, and how files there import them."""


def write_client(tool: str, directory: Path, facts: dict[str, str | int]) -> None:
    """Put a tool's files into a directory.

    Args:
        tool: the folder of this package.
        directory: is there.
        facts: what templates say: `name`, a slug; `title`, for people; `fingerprint`; `size`, the longest side in
            pixels of the images that prompts are given for; Swift's also `encoder` and `decoder`.
    """
    jinja = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    for name, text in _texts(tool).items():
        if name.endswith(".jinja"):
            name, text = name.removesuffix(".jinja"), jinja.from_string(text).render(facts)
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def client_files(tool: str) -> list[str]:
    """What `write_client` writes, by paths within the directory."""
    return [name.removesuffix(".jinja") for name in _texts(tool)]


def _texts(tool: str) -> dict[str, str]:
    ours = files("distill.clients")
    texts = {name: file.read_text(encoding="utf-8") for name, file in _files(ours / tool)}
    for shared, imported in SHARED.items():
        if any(imported in text for text in texts.values()):
            texts[shared.rpartition("/")[2]] = (ours / shared).read_text(encoding="utf-8")
    return texts


def _files(folder: Traversable, within: str = "") -> Iterator[tuple[str, Traversable]]:
    """The files of a folder and of those in it, by their paths within."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_file():
            yield within + entry.name, entry
        elif entry.name != "__pycache__" and not entry.name.startswith("."):  # what was built there
            yield from _files(entry, f"{within}{entry.name}/")
