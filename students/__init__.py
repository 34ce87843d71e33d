"""The models: a student is a name and a few numbers."""

from students.checkpoints import load_student, read_metadata, save_student
from students.encoder import StudentConfig, StudentEncoder, build_encoder, create_student, list_students
from students.errors import InputError, first_line
from students.sam import build_student_sam

__all__ = [
    "InputError",
    "StudentConfig",
    "StudentEncoder",
    "build_encoder",
    "build_student_sam",
    "create_student",
    "first_line",
    "list_students",
    "load_student",
    "read_metadata",
    "save_student",
]
