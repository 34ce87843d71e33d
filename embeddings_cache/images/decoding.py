"""A picture's bytes → pixels, and why that fails."""

import io
import re

import numpy as np
from PIL import Image, ImageOps

from students import first_line


def decode_image(encoded: bytes) -> np.ndarray:
    """Bytes of a jpg, png or webp → RGB uint8 (H, W, 3), turned upright as its EXIF orientation says.

    That is what `cv2.imread` does, which segment-anything's notebooks and scripts read images with: orientation
    applied, alpha dropped, 16 bits cut to the upper 8. Raises what Pillow raises for what is not a whole image.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            gray = np.asarray(upright).astype(np.uint32) >> 8
            return np.repeat(gray.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
        return np.asarray(upright.convert("RGB"))


def reason_of(error: Exception) -> str:
    """An error of decoding in one line, without the memory address that makes equal reasons differ."""
    return re.sub(r" ?<_io\.BytesIO[^>]*>", "", f"{type(error).__name__}: {first_line(error)}")
