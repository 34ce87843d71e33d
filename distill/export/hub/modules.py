"""The code that a hub's folder brings along: the student's own files, which transformers runs from there.

transformers copies a flat folder of modules that import each other by `from .name import`, so the files of `students/`
that build an encoder are handed out as they are, but for how they import: a second implementation would be another
encoder some day. Nothing of it reads checkpoints; ImageNet weights are left out (`imagenet.py` of the folder refuses).
"""

import re
from importlib.resources import files

MODULES = ("encoder", "backbones", "efficientvit", "depthwise", "necks", "folding", "errors")
"""Of `students/`; `encoder` builds a student of the others."""

REWRITTEN = (
    (r"^from students\.(\w+) import ", r"from .\1 import "),
    # The same layer; segment-anything need not be installed.
    (r"^from segment_anything\.modeling\.common import LayerNorm2d$", "from timm.layers import LayerNorm2d"),
)
"""Imports, and what becomes of them."""


def student_modules(version: str) -> dict[str, str]:
    """File names and texts of the modules, with a line that says where they are from.

    Raises:
        RuntimeError: one of them imports what is not handed out.
    """
    texts = {}
    for name in MODULES:
        text = (files("students") / f"{name}.py").read_text(encoding="utf-8")
        for pattern, replacement in REWRITTEN:
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        if found := re.search(r"^\s*(?:from|import) (?:students|segment_anything)\b.*$", text, re.MULTILINE):
            raise RuntimeError(f"students/{name}.py cannot be handed out: {found[0].strip()}")
        texts[f"{name}.py"] = (
            f"# From sam-distill {version}, Apache-2.0: students/{name}.py, but for its imports.\n{text}"
        )
    return texts
