"""The models: a student is a name and a few numbers."""

from students.architectures import (
    PUBLISHED,
    VITS,
    Contents,
    config_by_name,
    known_architectures,
    other_sizes,
    published_name,
    vit_encoder,
)
from students.backbones import check_pretrained, is_known, list_students
from students.checkpoints import (
    architecture_of,
    identify,
    inspect_checkpoint,
    is_our_student,
    load_checkpoint,
    load_encoder,
    load_student,
    read_metadata,
    save_published,
    save_student,
    student_config_of,
)
from students.encoder import (
    DOWNSAMPLES,
    NECKS,
    StudentConfig,
    StudentEncoder,
    build_encoder,
    create_student,
)
from students.errors import CheckFailed, InputError, first_line
from students.hub import fetch_from_hub, hub_address, is_hub_address, unreachable
from students.hugging_face import (
    hugging_face_decoder,
    hugging_face_decoder_config,
    hugging_face_preprocessing,
    save_hugging_face,
)
from students.macs import count_macs
from students.sam import build_student_sam, left_out, require_decoder, untrained_sam
from students.state_dicts import differences, read_state_dict, shapes_of, weight_files

__all__ = [
    "DOWNSAMPLES",
    "NECKS",
    "PUBLISHED",
    "VITS",
    "CheckFailed",
    "Contents",
    "InputError",
    "StudentConfig",
    "StudentEncoder",
    "architecture_of",
    "build_encoder",
    "build_student_sam",
    "check_pretrained",
    "config_by_name",
    "count_macs",
    "create_student",
    "differences",
    "fetch_from_hub",
    "first_line",
    "hub_address",
    "hugging_face_decoder",
    "hugging_face_decoder_config",
    "hugging_face_preprocessing",
    "identify",
    "inspect_checkpoint",
    "is_hub_address",
    "is_known",
    "is_our_student",
    "known_architectures",
    "left_out",
    "list_students",
    "load_checkpoint",
    "load_encoder",
    "load_student",
    "other_sizes",
    "published_name",
    "read_metadata",
    "read_state_dict",
    "require_decoder",
    "save_hugging_face",
    "save_published",
    "save_student",
    "shapes_of",
    "student_config_of",
    "unreachable",
    "untrained_sam",
    "vit_encoder",
    "weight_files",
]
