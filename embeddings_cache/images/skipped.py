"""Samples that are passed over: which, why, and whether they are too many; and what there is to know of others."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from embeddings_cache.system import whole_file
from students import InputError

ENOUGH_TO_JUDGE = 1000
"""Samples after which a running process may stop over `max_skipped`; before, chance decides too much."""


Skipped = Callable[[str, str], None]
"""Called with the key (or the source) and the reason for everything that is passed over."""


class SkippedSamples:
    """Collects what is passed over, and stops a process that passes over too much; called with key and reason.

    `good` counts the images that were not.

    Args:
        path: of `skipped.jsonl`.
        most: share of bad samples above which the run stops.
        rank: of this process.
    """

    def __init__(self, path: Path, most: float, good: int = 0, rank: int = 0) -> None:
        self.path = path
        self.rank = rank
        self.most = most
        self.good = good
        self.samples: list[tuple[str, str]] = []

    def __call__(self, key: str, reason: str) -> None:
        self.samples.append((key, reason))
        if len(self.samples) + self.good >= ENOUGH_TO_JUDGE:
            self.refuse_too_many()

    def note(self, key: str, what: str) -> None:
        """Keep what there is to know of an image that is used. It is on disk at once: what is embedded is not read
        again by the run that goes on after a crash."""
        with self.path.with_name(f"notes-{self.rank:05d}.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(key, what) + "\n")

    def write(self) -> None:
        """Put them into `path`, a line each."""
        lines = [_line(key, reason) + "\n" for key, reason in self.samples]
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def refuse_too_many(self) -> None:
        """Write them and raise `InputError` if their share is above `most` (`data.max_skipped`)."""
        seen = len(self.samples) + self.good
        if len(self.samples) > self.most * seen:
            self.write()
            raise InputError(
                f"{len(self.samples)} of {seen} samples are bad, more than data.max_skipped={self.most:g}"
                f"{self.commonest()}. {self.path} lists them"
            )

    def commonest(self) -> str:
        """The commonest reason with an example, to go on a line."""
        return f"; the commonest reason {commonest(self.samples)}" if self.samples else ""


def commonest(told: list[tuple[str, str]]) -> str:
    """`(12×, as in KEY): REASON` of the reason that was told most often."""
    (reason, count), *_ = Counter(reason for _, reason in told).most_common(1)
    example = next(key for key, why in told if why == reason)
    return f"({count}×, as in {example}): {reason}"


def gather_notes(directory: Path) -> list[tuple[str, str]]:
    """Put what all processes have noted, in this run and in those before it, into `notes.jsonl`; by key."""
    parts, path = sorted(directory.glob("notes-*.jsonl")), directory / "notes.jsonl"
    files = [*parts, path] if path.exists() else parts
    notes = sorted({note for file in files for note in read_notes(file)})
    if notes:
        with whole_file(path) as temporary:
            temporary.write_text("".join(f"{_line(*note)}\n" for note in notes), encoding="utf-8")
    for part in parts:
        part.unlink()
    return notes


def read_notes(path: Path) -> Iterator[tuple[str, str]]:
    """Keys and notes; a line that a crash cut off, and what was appended to it, is passed over."""
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            note = json.loads(line)
            yield note["key"], note["reason"]


def _line(key: str, reason: str) -> str:
    return json.dumps({"key": key, "reason": reason})
