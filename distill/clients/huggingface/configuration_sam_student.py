"""Configuration of a Segment Anything model whose image encoder is a student."""

from transformers import SamConfig


class SamStudentConfig(SamConfig):
    """SAM's own, and `student`, what it takes to build the encoder: the fields of `StudentConfig` in `encoder.py`.

    Of `vision_config` only the sizes count; there is no ViT.
    """

    model_type = "sam_student"
