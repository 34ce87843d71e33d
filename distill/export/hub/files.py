"""JSON as Hugging Face's libraries write it."""

import json
from pathlib import Path
from typing import Any


def write_text_json(path: Path, content: dict[str, Any]) -> None:
    """Two spaces, and a newline at the end: a hub shows and compares these files."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
