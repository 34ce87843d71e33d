"""What others' programs need of a student: the folders that exports make for CVAT and labelling tools.

A folder here is a tool's. Its files go beside the ONNX files as they are, those that end in `.jinja` filled in, and
`segmenter.py` with those that import it.
"""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from jinja2 import Environment, StrictUndefined

SHARED = "segmenter.py"


def write_client(tool: str, directory: Path, facts: dict[str, str | int]) -> None:
    """Put a tool's files into a directory.

    Args:
        tool: the folder of this package.
        directory: is there.
        facts: what templates say: `name`, a slug; `title`, for people; `fingerprint`; `size`, the longest side in
            pixels of the images that prompts are given for.
    """
    ours = files("distill.clients")
    jinja = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    texts = {file.name: file.read_text(encoding="utf-8") for file in _files(ours / tool)}
    if any("from segmenter import" in text for text in texts.values()):
        texts[SHARED] = (ours / SHARED).read_text(encoding="utf-8")
    for name, text in texts.items():
        if name.endswith(".jinja"):
            name, text = name.removesuffix(".jinja"), jinja.from_string(text).render(facts)
        (directory / name).write_text(text, encoding="utf-8")


def _files(folder: Traversable) -> list[Traversable]:
    return [file for file in sorted(folder.iterdir(), key=lambda file: file.name) if file.is_file()]
