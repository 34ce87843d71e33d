"""A row of the cache, and how its picture and its embedding are stored."""

import io
import zlib
from dataclasses import dataclass

import numpy as np
import torch
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


def encode_embedding(embedding: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Embedding (C, h, w) → what the cache keeps of it, by dataset.

    float16: `embeddings` (C, h, w) as it is. int8: `embeddings` int8 (C, h, w) and `scales` float32 (C,), symmetric for
    each channel of each image: embedding ≈ embeddings × scales, off by half a scale at most.
    """
    if dtype == "float16":
        return {"embeddings": embedding.astype(np.float16, copy=False)}
    wide = embedding.astype(np.float32)
    scales = np.abs(wide).max(axis=(1, 2)) / np.float32(127)
    steps = wide / np.where(scales > 0, scales, 1)[:, None, None]
    return {"embeddings": np.rint(steps).astype(np.int8), "scales": scales}


def decode_embedding(embeddings: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """Inverse of `encode_embedding`: float16 (C, h, w)."""
    if scales is None:
        return embeddings
    # PyTorch's conversion to float16 takes a tenth of NumPy's time.
    return torch.from_numpy(embeddings).float().mul_(torch.from_numpy(scales)[:, None, None]).half().numpy()


def crc32_of(row: CacheRow) -> int:
    """CRC-32 of key, picture and annotation, which HDF5's own checksums do not cover."""
    return zlib.crc32((row.annotation or "").encode(), zlib.crc32(row.encoded, zlib.crc32(row.key.encode())))


def encode_pixels(pixels: np.ndarray | Image.Image, quality: int | str) -> bytes:
    """RGB uint8 (h, w, 3) → JPEG of quality 1–100, or lossless PNG where quality is "png"."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    if quality == "png":
        image.save(buffer, "PNG", compress_level=1)
    else:
        image.save(buffer, "JPEG", quality=int(quality))
    return buffer.getvalue()


def decode_pixels(encoded: bytes) -> np.ndarray:
    """Inverse of `encode_pixels`."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
