"""What a run came to: as JSON, as a page to read, as pictures."""

from distill.report.results import report

__all__ = [
    "report",
]
