"""For whoever receives an export: what it holds, code that uses it, and files for others' programs."""

from distill.export.handover.published import convert
from distill.export.handover.readme import write_readme

__all__ = [
    "convert",
    "write_readme",
]
