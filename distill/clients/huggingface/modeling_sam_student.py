"""transformers' `SamModel` with a student in the place of its image encoder."""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamModel,
    SamPositionalEmbedding,
    SamPreTrainedModel,
    SamPromptEncoder,
    SamVisionEncoderOutput,
)

from .configuration_sam_student import SamStudentConfig
from .encoder import StudentConfig, build_encoder

if TYPE_CHECKING:  # transformers 4 takes the files along that this one names, and not those that they name in turn
    from .backbones import build_backbone  # noqa: F401
    from .depthwise import scale_channels  # noqa: F401
    from .efficientvit import efficientvit_xl  # noqa: F401
    from .errors import InputError  # noqa: F401
    from .folding import fold_norms  # noqa: F401
    from .imagenet import load_from_file  # noqa: F401
    from .necks import sam_neck  # noqa: F401

# The table by which the mask-generation pipeline knows models; it complains of others.
MODEL_FOR_MASK_GENERATION_MAPPING_NAMES.setdefault("sam_student", "SamStudentModel")


class StudentVisionEncoder(nn.Module):
    """A student behind the interface of `SamVisionEncoder`."""

    def __init__(self, config: SamStudentConfig) -> None:
        super().__init__()
        self.encoder = build_encoder(StudentConfig(**config.student))
        # transformers builds a model without values and fills in those of the file: buffers that are computed have to
        # be in it as well.
        for module in list(self.encoder.modules()):
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer)

    def forward(self, pixel_values: torch.Tensor, **_: object) -> SamVisionEncoderOutput:
        """Normalised, padded images (B, 3, S, S) → embeddings (B, C, S/16, S/16)."""
        return SamVisionEncoderOutput(last_hidden_state=self.encoder(pixel_values))


class SamStudentModel(SamModel):
    """`SamModel`, prompts in and masks out, of which only the image encoder is another."""

    config_class = SamStudentConfig
    supports_gradient_checkpointing = False
    _no_split_modules = ["StudentVisionEncoder"]  # noqa: RUF012

    def __init__(self, config: SamStudentConfig) -> None:
        SamPreTrainedModel.__init__(self, config)  # SamModel's own builds a ViT
        self.shared_image_embedding = SamPositionalEmbedding(config.vision_config)
        self.vision_encoder = StudentVisionEncoder(config)
        self.prompt_encoder = SamPromptEncoder(config)
        config.mask_decoder_config._attn_implementation = config._attn_implementation
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)
        self.post_init()
