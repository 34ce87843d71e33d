"""What was measured, item by item: lines of JSON on disk at once, so that a killed run loses what was in hand alone."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, Protocol

RESULT, SKIPPED = "result", "skipped"


Place = tuple[str, str]
"""An item's key, and a stamp that tells it from what it was before its files changed."""


class Keep(Protocol):
    """Adds a line for an item: `result=...`, or `skipped=...` and why."""

    def __call__(self, key: str, stamp: str, **line: Any) -> None: ...


@dataclass(frozen=True)
class Kept:
    """The lines of one contestant under one task's settings.

    Args:
        folder: `evaluation/TASK/` of a run directory.
        name: the contestant's.
        digest: of all that its results depend on.
    """

    folder: Path
    name: str
    digest: str

    @property
    def pictures(self) -> Path:
        """A folder for what can be looked at."""
        return self.folder / f"{self._stem}"

    def read(self) -> dict[Place, dict[str, Any]]:
        """Lines of all processes that there have ever been. Where an item was skipped once and measured once, it was
        measured."""
        lines: dict[Place, dict[str, Any]] = {}
        for place, line in self._lines():
            if RESULT not in lines.get(place, {}):
                lines[place] = line
        return lines

    def measured(self) -> set[Place]:
        """Those that have a result, which is not kept in memory."""
        return {place for place, line in self._lines() if RESULT in line}

    def _lines(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Those that are whole: a crash may have cut one off."""
        for path in sorted(self.folder.glob(f"{escape(self._stem)}-*.jsonl")):
            with path.open(encoding="utf-8") as file:
                for text in file:
                    with suppress(ValueError):
                        line = json.loads(text)
                        yield (line.pop("key"), line.pop("stamp")), line

    @contextmanager
    def keeper(self, rank: int) -> Iterator[Keep]:
        """Add lines, to a file of this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._stem}-{rank}.jsonl"
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a crash has cut a line off
                    file.write(b"\n")

            def keep(key: str, stamp: str, **line: Any) -> None:
                file.write(json.dumps({"key": key, "stamp": stamp, **line}).encode() + b"\n")
                file.flush()

            yield keep

    @property
    def _stem(self) -> str:
        return f"{''.join(c if c.isalnum() or c in '-_.' else '_' for c in self.name)}-{self.digest}"
