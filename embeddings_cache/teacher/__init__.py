"""The teacher: any SAM, or the toy that comes with the package, and its encoder at work."""

from embeddings_cache.teacher.encoder import TEACHER_DTYPES, TeacherEncoder, resolve_compile, resolve_dtype
from embeddings_cache.teacher.loading import (
    check_teacher,
    inspect_teacher,
    known_teachers,
    load_teacher,
    weights_sha256,
)
from embeddings_cache.teacher.toy import (
    TOY_CHANNELS,
    TOY_IMAGE_SIZE,
    WEIGHTS,
    build_toy_sam,
    load_toy_state,
    load_toy_teacher,
    read_toy_state,
)
from embeddings_cache.teacher.vit import fuse_attention

__all__ = [
    "TEACHER_DTYPES",
    "TOY_CHANNELS",
    "TOY_IMAGE_SIZE",
    "WEIGHTS",
    "TeacherEncoder",
    "build_toy_sam",
    "check_teacher",
    "fuse_attention",
    "inspect_teacher",
    "known_teachers",
    "load_teacher",
    "load_toy_state",
    "load_toy_teacher",
    "read_toy_state",
    "resolve_compile",
    "resolve_dtype",
    "weights_sha256",
]
