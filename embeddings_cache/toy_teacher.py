"""A small SAM with seeded random weights, so that every stage can run without any download.

It segments nothing: what it shows is that the pipeline works. `build_toy_teacher` is the seam where a trained one
takes its place.
"""

from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from embeddings_cache.preprocess import PIXEL_MEAN, PIXEL_STD

SEED = 20230405  # the day SAM was published
CHANNELS = 64


def build_toy_teacher(image_size: int) -> Sam:
    """segment-anything's own `Sam` class with 64 channels and a 4-block ViT, equal on every call.

    Args:
        image_size: side S of the square input in pixels; a multiple of 16.

    Returns:
        A `Sam` in eval mode whose embedding has shape (B, 64, S/16, S/16).
    """
    cells = image_size // 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        sam = Sam(
            image_encoder=ImageEncoderViT(
                img_size=image_size,
                patch_size=16,
                embed_dim=96,
                depth=4,
                num_heads=3,
                out_chans=CHANNELS,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                window_size=8,
                global_attn_indexes=(3,),
            ),
            prompt_encoder=PromptEncoder(
                embed_dim=CHANNELS,
                image_embedding_size=(cells, cells),
                input_image_size=(image_size, image_size),
                mask_in_chans=16,
            ),
            mask_decoder=MaskDecoder(
                num_multimask_outputs=3,
                transformer=TwoWayTransformer(depth=2, embedding_dim=CHANNELS, mlp_dim=256, num_heads=4),
                transformer_dim=CHANNELS,
                iou_head_depth=3,
                iou_head_hidden_dim=64,
            ),
            pixel_mean=list(PIXEL_MEAN),
            pixel_std=list(PIXEL_STD),
        )
        # segment-anything leaves positions at zero for a checkpoint to fill.
        for name, parameter in sam.image_encoder.named_parameters():
            if "pos" in name:
                nn.init.trunc_normal_(parameter, std=0.2)
    return sam.eval()
