"""Samples that are passed over: which, why, and whether they are too many."""

import json
from collections import Counter
from collections.abc import Callable
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
    """

    def __init__(self, path: Path, most: float, good: int = 0) -> None:
        self.path = path
        self.most = most
        self.good = good
        self.samples: list[tuple[str, str]] = []

    def __call__(self, key: str, reason: str) -> None:
        self.samples.append((key, reason))
        if len(self.samples) + self.good >= ENOUGH_TO_JUDGE:
            self.refuse_too_many()

    def write(self) -> None:
        """Put them into `path`, a line each."""
        lines = [json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in self.samples]
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
        if not self.samples:
            return ""
        (reason, count), *_ = Counter(reason for _, reason in self.samples).most_common(1)
        example = next(key for key, why in self.samples if why == reason)
        return f"; the commonest reason ({count}×, as in {example}): {reason}"
