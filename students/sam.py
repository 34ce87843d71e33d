"""A whole SAM around a student encoder."""

from segment_anything.modeling import Sam
from torch import nn


def build_student_sam(encoder: nn.Module, teacher_sam: Sam) -> Sam:
    """Put a student in the place of the teacher's image encoder.

    Args:
        encoder: (B, 3, S, S) normalised → (B, C, S/16, S/16), with an attribute `img_size` = S.
        teacher_sam: whose prompt encoder and mask decoder are used, shared and not copied.

    Returns:
        A `Sam` in eval mode, for `SamPredictor` and `SamAutomaticMaskGenerator`.

    Raises:
        ValueError: the encoder's image size or channels are not those that the teacher's prompt encoder works with.
    """
    size = teacher_sam.prompt_encoder.input_image_size[0]
    if encoder.img_size != size:
        raise ValueError(f"the encoder works at {encoder.img_size} px, the teacher's prompt encoder at {size} px")
    channels = getattr(encoder, "embed_dim", teacher_sam.prompt_encoder.embed_dim)
    if channels != teacher_sam.prompt_encoder.embed_dim:
        raise ValueError(
            f"the encoder makes {channels} channels, the decoder takes {teacher_sam.prompt_encoder.embed_dim}"
        )
    sam = Sam(
        image_encoder=encoder,
        prompt_encoder=teacher_sam.prompt_encoder,
        mask_decoder=teacher_sam.mask_decoder,
        pixel_mean=teacher_sam.pixel_mean.flatten().tolist(),
        pixel_std=teacher_sam.pixel_std.flatten().tolist(),
    )
    return sam.to(teacher_sam.device).eval()
