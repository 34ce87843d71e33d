"""A row of the cache, and how its picture is stored."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class CacheRow:
    """One image and what the teacher made of it.

    `embedding` is float16 (C, h, w); `encoded` the JPEG or PNG of the resized image; sizes are (height, width) before
    and after resizing; `annotation` is SA-1B's JSON text, or None.
    """

    key: str
    embedding: np.ndarray
    encoded: bytes
    original_size: tuple[int, int]
    input_size: tuple[int, int]
    annotation: str | None

    def pixels(self) -> np.ndarray:
        """The very pixels that the teacher saw: RGB uint8 (h, w, 3)."""
        return decode_pixels(self.encoded)


def encode_pixels(pixels: np.ndarray, quality: int | str) -> bytes:
    """RGB uint8 (h, w, 3) → JPEG of quality 1–100, or lossless PNG where quality is "png"."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if quality == "png":
        image.save(buffer, "PNG", compress_level=1)
    else:
        image.save(buffer, "JPEG", quality=int(quality))
    return buffer.getvalue()


def decode_pixels(encoded: bytes) -> np.ndarray:
    """Inverse of `encode_pixels`."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))
