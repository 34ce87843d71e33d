"""A picture's file → what the encoder looks at."""

import hashlib
from dataclasses import dataclass

import numpy as np

from distill.serve.errors import Refused
from embeddings_cache.images import Reading, TooManyPixels, decode_picture, reason_of, resize_picture

ID_LENGTH = 32
"""Hexadecimal digits of a picture's id, 128 bits of the SHA-256 of its file."""


@dataclass(frozen=True)
class Picture:
    """RGB uint8 (h, w, 3), the longest side as the encoder takes it; and height and width of the file's picture."""

    pixels: np.ndarray
    original_size: tuple[int, int]


def id_of(encoded: bytes) -> str:
    """What a picture goes by: the same for the same file."""
    return hashlib.sha256(encoded).hexdigest()[:ID_LENGTH]


def read_picture(encoded: bytes, image_size: int, reading: Reading) -> Picture:
    """Decode, turn upright and resize a picture of any kind that Pillow reads.

    Raises:
        Refused: it is none, is cut short, too large or too elongated.
    """
    try:
        whole = decode_picture(encoded, reading)
    except TooManyPixels as error:
        raise Refused(413, "too_many_pixels", f"a picture has {reading.max_pixels:,} pixels at most") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise of many kinds for what is no picture
        raise Refused(422, "bad_picture", f"the picture cannot be read: {reason_of(error)[:200]}") from error
    try:
        return Picture(np.asarray(resize_picture(whole, image_size)), (whole.height, whole.width))
    except ValueError as error:
        raise Refused(422, "bad_picture", f"the picture {error}") from error
