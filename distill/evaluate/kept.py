"""What was measured, item by item: lines of JSON on disk at once, so that a killed run loses what was in hand alone."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, Protocol

RESULT, SKIPPED = "result", "skipped"


class Keep(Protocol):
    """Puts a line under a key: `result=...`, or `skipped=...` and why."""

    def __call__(self, key: str, **line: Any) -> None: ...


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

    def read(self) -> dict[str, dict[str, Any]]:
        """Lines by key, of all processes that there have ever been; one that a crash cut off is left out."""
        lines: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob(f"{escape(self._stem)}-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):
                    found = json.loads(line)
                    if RESULT in found or RESULT not in lines.get(found["key"], {}):
                        lines[found["key"]] = found
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

            def keep(key: str, **line: Any) -> None:
                file.write(json.dumps({"key": key, **line}) + "\n")
                file.flush()

            yield keep

    @property
    def _stem(self) -> str:
        return f"{''.join(c if c.isalnum() or c in '-_.' else '_' for c in self.name)}-{self.digest}"
