"""Folders for Hugging Face's libraries: transformers.js, and transformers with its hub."""

from distill.export.hub.hugging_face import export_hugging_face
from distill.export.hub.transformers_js import export_transformers_js
from distill.export.hub.upload import check_publish, for_publishing, is_exported, publish

__all__ = [
    "check_publish",
    "export_hugging_face",
    "export_transformers_js",
    "for_publishing",
    "is_exported",
    "publish",
]
