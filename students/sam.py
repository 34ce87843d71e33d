"""A whole SAM around a student encoder."""

from typing import Any

from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from students.errors import InputError


def untrained_sam(encoder: nn.Module, image_size: int = 1024, embed_dim: int = 256) -> Sam:
    """A `Sam` whose prompt encoder and mask decoder have the published sizes, and weights that are drawn."""
    cells = image_size // 16
    return Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(embed_dim, (cells, cells), (image_size, image_size), mask_in_chans=16),
        mask_decoder=MaskDecoder(
            transformer_dim=embed_dim,
            transformer=TwoWayTransformer(depth=2, embedding_dim=embed_dim, num_heads=8, mlp_dim=2048),
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
    )


def encoder_only_sam(encoder: nn.Module, origin: str, left_out: str = "") -> Sam:
    """A `Sam` that makes embeddings, for a checkpoint without prompt encoder and mask decoder of SAM's own.

    Whoever asks it for masks gets an `InputError` that names `origin`.

    Args:
        left_out: what the checkpoint has beside the encoder that is not used, and why; "" where it has nothing.
    """
    missing = MissingPart(f"{origin}: {left_out}" if left_out else "", f"{origin} holds an image encoder alone")
    return Sam(encoder, missing, missing)


def require_decoder(sam: Sam) -> None:
    """Raise `InputError` where a `Sam` is `encoder_only_sam`'s."""
    if isinstance(sam.prompt_encoder, MissingPart):
        sam.prompt_encoder()


def left_out(sam: Sam) -> str | None:
    """A line for whoever uses a `Sam` of whose checkpoint the encoder alone was taken: what was left, and why."""
    return (isinstance(sam.prompt_encoder, MissingPart) and sam.prompt_encoder.left_out) or None


class MissingPart(nn.Module):
    """Stands where a checkpoint has nothing, or nothing of SAM's own; `left_out` is a line that says what."""

    def __init__(self, left_out: str, why: str) -> None:
        super().__init__()
        self.left_out, self.why = left_out, left_out or why

    def forward(self, *arguments: Any, **options: Any) -> Any:
        raise InputError(
            f"{self.why}; build_student_sam(sam.image_encoder, another_sam) "
            "gives it another SAM's prompt encoder and mask decoder"
        )


def build_student_sam(encoder: nn.Module, teacher_sam: Sam) -> Sam:
    """Put a student in the place of the teacher's image encoder.

    Args:
        encoder: (B, 3, S, S) normalised → (B, C, S/16, S/16), with an attribute `img_size` = S.
        teacher_sam: whose prompt encoder and mask decoder are used, shared and not copied.

    Returns:
        A `Sam` in eval mode, for `SamPredictor` and `SamAutomaticMaskGenerator`.

    Raises:
        InputError: the teacher is an encoder alone.
        ValueError: the encoder's image size or channels are not those that the teacher's prompt encoder works with.
    """
    require_decoder(teacher_sam)
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
