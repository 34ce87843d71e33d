"""For whoever receives an export: what it holds, code that uses it, and files for others' programs."""

from distill.export.handover.published import check_sam, convert
from distill.export.handover.readme import write_readme

__all__ = [
    "check_sam",
    "convert",
    "write_readme",
]
