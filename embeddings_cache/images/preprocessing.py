"""How an image becomes encoder input. Defined here once; teacher, training, evaluation and export all use it.

As `SamPredictor.set_image` does it (segment_anything/predictor.py, modeling/sam.py): RGB uint8, the longest side
resized to S, (x − mean) / std, zeros to the right and below up to S×S.
"""

import hashlib
import json

import numpy as np
import torch
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide
from torchvision.transforms.functional import resize

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
"""RGB, 0–255; segment_anything/build_sam.py. The mean is also the colour that padding has in 0–255 space."""


def resize_longest_side(image: np.ndarray, size: int) -> np.ndarray:
    """`resize_picture` of an array: RGB uint8 (H, W, 3) → RGB uint8 (h, w, 3)."""
    return np.array(resize_picture(Image.fromarray(image), size))


def resize_picture(picture: Image.Image, size: int) -> Image.Image:
    """RGB → RGB with max(h, w) = size, by segment-anything's own resampling.

    `ResizeLongestSide.apply_image` does the same, and copies into arrays and back.

    Raises:
        ValueError: the picture is so elongated that its short side would round to no pixel at all.
    """
    return resize(picture, list(resized_shape((picture.height, picture.width), size)))


def resized_shape(original_size: tuple[int, int], size: int) -> tuple[int, int]:
    """Height and width of what `resize_picture` makes; raises as it does."""
    height, width = ResizeLongestSide.get_preprocess_shape(*original_size, size)
    if min(height, width) < 1:
        raise ValueError(f"{original_size[1]}×{original_size[0]} px is too elongated for a longest side of {size} px")
    return height, width


def pad_pixels(pixels: np.ndarray | torch.Tensor, size: int) -> torch.Tensor:
    """Resized RGB uint8 (h, w, 3) → uint8 (3, size, size) on the device where the pixels are.

    The padding's value is irrelevant to `to_encoder_input`.
    """
    picture = torch.tensor(pixels) if isinstance(pixels, np.ndarray) else pixels
    padded = picture.new_zeros(3, size, size)
    padded[:, : picture.shape[0], : picture.shape[1]] = picture.permute(2, 0, 1)
    return padded


def to_encoder_input(pixels: torch.Tensor, input_size: torch.Tensor) -> torch.Tensor:
    """Normalise on the device where the pixels are, and zero what lies outside the image.

    Args:
        pixels: uint8 (B, 3, S, S), from `pad_pixels`.
        input_size: int (B, 2), height and width of the image within.

    Returns:
        float32 (B, 3, S, S), bit-equal to `Sam.preprocess`.
    """
    side = torch.arange(pixels.shape[-1], device=pixels.device)
    height, width = input_size.to(pixels.device)[:, :, None].unbind(1)
    inside = (side < height)[:, None, :, None] & (side < width)[:, None, None, :]
    return normalize(pixels).masked_fill(~inside, 0.0)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """(x − mean) / std over RGB 0–255 (B, 3, H, W), uint8 or float; returns float32."""
    mean = torch.tensor(PIXEL_MEAN, device=pixels.device).view(-1, 1, 1)
    std = torch.tensor(PIXEL_STD, device=pixels.device).view(-1, 1, 1)
    return (pixels - mean) / std


def fingerprint(sixteen_bit: str = "upper") -> str:
    """Names this preprocessing, with what becomes of 16 bits; a cache that carries another one is refused."""
    what: dict[str, object] = {
        "resize": "longest side, segment_anything ResizeLongestSide.apply_image",
        "mean": PIXEL_MEAN,
        "std": PIXEL_STD,
        "pad": "zeros, right and bottom, after normalisation",
        "orientation": "EXIF applied",
    }
    if sixteen_bit != "upper":
        what["sixteen_bit"] = sixteen_bit
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
