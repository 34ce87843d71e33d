"""What was measured, item by item: lines of JSON on disk at once, so that a killed run loses what was in hand alone."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, Protocol

RESULT, SKIPPED = "result", "skipped"


Stamp = tuple[int | None, ...]
"""What tells an item whose files have changed from the one that was measured."""


class Keep(Protocol):
    """Adds a line for an item: `result=...`, or `skipped=...` and why."""

    def __call__(self, key: str, stamp: Stamp, **line: Any) -> None: ...


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

    def read(self) -> dict[tuple[str, Stamp], dict[str, Any]]:
        """Lines by key and stamp, of all processes that there have ever been; one that a crash cut off is left out.
        Where an item was skipped once and measured once, it was measured."""
        lines: dict[tuple[str, Stamp], dict[str, Any]] = {}
        for path in sorted(self.folder.glob(f"{escape(self._stem)}-*.jsonl")):
            for text in path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):
                    line = json.loads(text)
                    place = line.pop("key"), tuple(line.pop("stamp"))
                    if RESULT not in lines.get(place, {}):
                        lines[place] = line
        return lines

    @contextmanager
    def keeper(self, rank: int) -> Iterator[Keep]:
        """Add lines, to a file of this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._stem}-{rank}.jsonl"
        cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            if cut_off:
                file.write("\n")

            def keep(key: str, stamp: Stamp, **line: Any) -> None:
                file.write(json.dumps({"key": key, "stamp": stamp, **line}) + "\n")
                file.flush()

            yield keep

    @property
    def _stem(self) -> str:
        return f"{''.join(c if c.isalnum() or c in '-_.' else '_' for c in self.name)}-{self.digest}"
