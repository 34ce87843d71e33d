"""A small SAM that segments generated scenes: a teacher that comes with the package.

segment-anything's own classes with few channels, trained on `embeddings_cache.images.scenes` by
`recipes/toy_teacher.py`. It knows those scenes and nothing else; on photographs its masks are poor. The same script
makes one of labelled photographs, a checkpoint that teaches in its place.
"""

from functools import partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from embeddings_cache.images import PIXEL_MEAN, PIXEL_STD
from students import InputError, differences, read_state_dict, shapes_of

TOY_IMAGE_SIZE = 256
TOY_CHANNELS = 128
WIDTH, DEPTH, HEADS = 192, 5, 6
WINDOW = 8
LARGEST_CELLS = 256
WEIGHTS = "toy_teacher.safetensors"


def load_toy_teacher(image_size: int = TOY_IMAGE_SIZE, checkpoint: str | Path | None = None) -> Sam:
    """The trained toy teacher.

    Args:
        image_size: side S of the square input in pixels; a multiple of 16. It was trained at 256; at other sizes its
            positions are interpolated and its masks are less good.
        checkpoint: what `recipes/toy_teacher.py` made of other pictures; default: the weights in the package.

    Returns:
        A `Sam` in eval mode whose embedding has shape (B, 128, S/16, S/16).

    Raises:
        InputError: the checkpoint is missing, damaged or no toy's.
    """
    state = read_toy_state(checkpoint or str(files(__package__).joinpath(WEIGHTS)))
    sam = build_toy_sam(image_size)
    load_toy_state(sam, state)
    return sam.eval()


def read_toy_state(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a toy, for whatever image size; nothing in the file is executed.

    Raises:
        InputError: the file is missing, damaged or no toy's; names the tensors that differ.
    """
    state = read_state_dict(Path(checkpoint))
    positions = state.get("image_encoder.pos_embed", torch.empty(0))
    cells = positions.shape[1] if positions.ndim == 4 else 0
    # A stranger's file must not decide how much memory is asked for.
    size = 16 * cells if 0 < cells <= LARGEST_CELLS else TOY_IMAGE_SIZE
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        expected = shapes_of(build_toy_sam(size).state_dict())
    if differing := differences(expected, shapes_of(state)):
        raise InputError(f"{checkpoint} holds no toy teacher: {differing}")
    return state


def build_toy_sam(image_size: int) -> Sam:
    """The toy teacher before training; its weights follow from torch's seed."""
    cells = image_size // 16
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=image_size,
            patch_size=16,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            out_chans=TOY_CHANNELS,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=WINDOW,
            global_attn_indexes=tuple(range(1, DEPTH, 2)),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=TOY_CHANNELS,
            image_embedding_size=(cells, cells),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=TOY_CHANNELS, mlp_dim=512, num_heads=4),
            transformer_dim=TOY_CHANNELS,
            iou_head_depth=3,
            iou_head_hidden_dim=128,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )
    sam.image_encoder.patch_embed = ConvStem(WIDTH)
    # segment-anything leaves positions at zero for a checkpoint to fill.
    for name, parameter in sam.image_encoder.named_parameters():
        if "pos" in name:
            nn.init.trunc_normal_(parameter, std=0.02)
    return sam


def load_toy_state(sam: Sam, state: dict[str, torch.Tensor]) -> None:
    """Fill a toy with the weights of one that may work at another image size."""
    expected = sam.state_dict()
    sam.load_state_dict(
        {
            name: tensor if tensor.shape == expected[name].shape else _interpolate(tensor.float(), expected[name].shape)
            for name, tensor in state.items()
        }
    )


class ConvStem(nn.Sequential):
    """Four 3×3 convolutions of stride 2 in place of one 16×16 patch embedding: (B, 3, S, S) → (B, S/16, S/16, C).

    A ViT this small learns several times faster with one ("Early Convolutions Help Transformers See Better",
    arXiv:2106.14881, section 3).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (3, 32, 64, 128)
        for before, after in pairwise(widths):
            self.extend([nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.GELU()])
        self.append(nn.Conv2d(widths[-1], channels, 3, 2, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().forward(pixels).permute(0, 2, 3, 1)


def _interpolate(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Absolute positions (1, h, w, C) or relative ones (2n - 1, C) for another number of cells."""
    if tensor.ndim == 4:
        grid = F.interpolate(tensor.permute(0, 3, 1, 2), size=shape[1:3], mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1)
    return F.interpolate(tensor.T[None], size=shape[0], mode="linear", align_corners=False)[0].T
