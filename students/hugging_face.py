"""SAM as Hugging Face's transformers keeps it: what `SamModel` calls its weights, and a directory that it loads.

`SamModel` computes what segment-anything computes, but for the epsilon of its decoder's layer norms: 1e-6 unless the
config says otherwise, where SAM was trained with 1e-5, which moves the logits of masks by some 1e-4. What is read here
has SAM's, what is written says so. `SamModel` has SAM's own encoder alone: a student goes beside its decoder as code.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from segment_anything.modeling import ImageEncoderViT, Sam
from segment_anything.modeling.image_encoder import PatchEmbed

from students.errors import InputError
from students.sam import require_decoder

VISION_PREFIX = "vision_encoder."

POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
SHARED_POSITIONS = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)
"""One tensor that transformers knows by two names; some of its versions write the first alone."""

HEADS = ("iou_prediction_head.", *(f"output_hypernetworks_mlps.{number}." for number in range(4)))
"""Perceptrons of three layers, of which transformers names the first and the last by what they do."""

STARTS = (
    ("image_encoder.patch_embed.proj.", "vision_encoder.patch_embed.projection."),
    ("image_encoder.blocks.", "vision_encoder.layers."),
    ("image_encoder.neck.0.", "vision_encoder.neck.conv1."),
    ("image_encoder.neck.1.", "vision_encoder.neck.layer_norm1."),
    ("image_encoder.neck.2.", "vision_encoder.neck.conv2."),
    ("image_encoder.neck.3.", "vision_encoder.neck.layer_norm2."),
    ("image_encoder.", VISION_PREFIX),
    *((POSITIONS, name) for name in SHARED_POSITIONS),
    ("prompt_encoder.point_embeddings.", "prompt_encoder.point_embed."),
    ("prompt_encoder.mask_downscaling.0.", "prompt_encoder.mask_embed.conv1."),
    ("prompt_encoder.mask_downscaling.1.", "prompt_encoder.mask_embed.layer_norm1."),
    ("prompt_encoder.mask_downscaling.3.", "prompt_encoder.mask_embed.conv2."),
    ("prompt_encoder.mask_downscaling.4.", "prompt_encoder.mask_embed.layer_norm2."),
    ("prompt_encoder.mask_downscaling.6.", "prompt_encoder.mask_embed.conv3."),
    ("mask_decoder.output_upscaling.0.", "mask_decoder.upscale_conv1."),
    ("mask_decoder.output_upscaling.1.", "mask_decoder.upscale_layer_norm."),
    ("mask_decoder.output_upscaling.3.", "mask_decoder.upscale_conv2."),
    *((f"mask_decoder.{head}layers.0.", f"mask_decoder.{head}proj_in.") for head in HEADS),
    *((f"mask_decoder.{head}layers.1.", f"mask_decoder.{head}layers.0.") for head in HEADS),
    *((f"mask_decoder.{head}layers.2.", f"mask_decoder.{head}proj_out.") for head in HEADS),
)
"""What names begin with in segment-anything, and in transformers."""

NORM, HUGGING_FACE_NORM = ".norm", ".layer_norm"
"""In the blocks of encoder and decoder."""


def from_hugging_face(state: Mapping[str, torch.Tensor], origin: str) -> dict[str, torch.Tensor]:
    """The same tensors by segment-anything's names; one that `SamModel` does not have keeps its own.

    Raises:
        InputError: the two copies of the positions differ, so that no SAM is what the file holds.
    """
    copies = [state[name].float() for name in SHARED_POSITIONS if name in state]
    if len(copies) == 2 and not torch.equal(*copies):
        raise InputError(f"{origin} is no SAM: {' and '.join(SHARED_POSITIONS)} differ")
    swapped = [(theirs, ours) for ours, theirs in STARTS]
    return {_restart(name, swapped).replace(HUGGING_FACE_NORM, NORM): tensor for name, tensor in state.items()}


def to_hugging_face(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a `Sam` by `SamModel`'s names."""
    renamed = {_restart(name, STARTS).replace(NORM, HUGGING_FACE_NORM): tensor for name, tensor in state.items()}
    return {**renamed, SHARED_POSITIONS[1]: renamed[SHARED_POSITIONS[0]].clone()}


def save_hugging_face(directory: Path, sam: Sam) -> None:
    """Write `model.safetensors` (float32), `config.json` and `preprocessor_config.json`, from which
    `SamModel.from_pretrained(directory)` and `SamProcessor.from_pretrained(directory)` make the same SAM.

    Raises:
        InputError: the encoder is not SAM's own, or there is no decoder.
    """
    encoder = sam.image_encoder
    if not isinstance(encoder, ImageEncoderViT) or not isinstance(encoder.patch_embed, PatchEmbed):
        raise InputError("transformers' SamModel has SAM's own image encoder (ViT) and no other")
    require_decoder(sam)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = to_hugging_face(sam.state_dict())
    save_file(
        {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    contents = {"config.json": _config(sam), "preprocessor_config.json": hugging_face_preprocessing(sam)}
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def hugging_face_decoder(sam: Sam) -> dict[str, torch.Tensor]:
    """Weights of prompt encoder and mask decoder, and the positions, by `SamModel`'s names."""
    return to_hugging_face({name: t for name, t in sam.state_dict().items() if not name.startswith("image_encoder.")})


def _config(sam: Sam) -> dict[str, Any]:
    """What `SamConfig` reads, by the numbers of the modules."""
    encoder = sam.image_encoder
    patch, block = encoder.patch_embed.proj, encoder.blocks[0]
    windows = [block.window_size for block in encoder.blocks]
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": {
            "image_size": encoder.img_size,
            "patch_size": patch.kernel_size[0],
            "hidden_size": patch.out_channels,
            "output_channels": encoder.neck[0].out_channels,
            "num_hidden_layers": len(encoder.blocks),
            "num_attention_heads": block.attn.num_heads,
            "mlp_dim": block.mlp.lin1.out_features,
            "mlp_ratio": block.mlp.lin1.out_features / patch.out_channels,
            "layer_norm_eps": block.norm1.eps,
            "qkv_bias": block.attn.qkv.bias is not None,
            "use_abs_pos": encoder.pos_embed is not None,
            "use_rel_pos": block.attn.use_rel_pos,
            "window_size": max(windows),
            "global_attn_indexes": [number for number, window in enumerate(windows) if not window],
            "num_pos_feats": sam.prompt_encoder.embed_dim // 2,
        },
        **hugging_face_decoder_config(sam),
    }


def hugging_face_decoder_config(sam: Sam) -> dict[str, Any]:
    """What `SamConfig` reads of prompt encoder and mask decoder, by the numbers of the modules."""
    prompts, decoder = sam.prompt_encoder, sam.mask_decoder
    layer, size = decoder.transformer.layers[0], prompts.input_image_size[0]
    return {
        "prompt_encoder_config": {
            "image_size": size,
            "patch_size": size // prompts.image_embedding_size[0],
            "hidden_size": prompts.embed_dim,
            "mask_input_channels": prompts.mask_downscaling[3].out_channels,
            "num_point_embeddings": prompts.num_point_embeddings,
        },
        "mask_decoder_config": {
            "hidden_size": decoder.transformer_dim,
            "mlp_dim": layer.mlp.lin1.out_features,
            "num_hidden_layers": len(decoder.transformer.layers),
            "num_attention_heads": layer.self_attn.num_heads,
            "attention_downsample_rate": decoder.transformer_dim // layer.cross_attn_token_to_image.internal_dim,
            "num_multimask_outputs": decoder.num_multimask_outputs,
            "iou_head_depth": decoder.iou_prediction_head.num_layers,
            "iou_head_hidden_dim": decoder.iou_prediction_head.layers[0].out_features,
            "layer_norm_eps": layer.norm1.eps,
        },
    }


def hugging_face_preprocessing(sam: Sam) -> dict[str, Any]:
    """What `SamImageProcessor` reads; it divides pixels by 255 before it normalises them."""
    side, mask_side = sam.prompt_encoder.input_image_size[0], sam.prompt_encoder.mask_input_size[0]
    return {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": side},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in sam.pixel_mean.flatten().tolist()],
        "image_std": [value / 255 for value in sam.pixel_std.flatten().tolist()],
        "do_pad": True,
        "pad_size": {"height": side, "width": side},
        "mask_size": {"longest_edge": mask_side},
        "mask_pad_size": {"height": mask_side, "width": mask_side},
    }


def _restart(name: str, starts: Iterable[tuple[str, str]]) -> str:
    """A name with another beginning, by the first that it begins with."""
    return next((other + name[len(start) :] for start, other in starts if name.startswith(start)), name)
