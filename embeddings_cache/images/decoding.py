"""A picture's bytes → pixels, and why that fails."""

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

from embeddings_cache.images.formats import format_names
from students import first_line

SIXTEEN_BIT = ("upper", "stretch")
"""What becomes of 16 bits: the upper 8, as OpenCV has them, or all between a picture's darkest and brightest value."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by EXIF's orientation (EXIF 2.32, section 4.6.4)."""


@dataclass(frozen=True)
class Reading:
    """How pictures are read: `data.max_pixels` and `data.sixteen_bit` of a recipe."""

    max_pixels: int = 178_956_970
    sixteen_bit: str = "upper"


AS_OPENCV = Reading()


class TooManyPixels(ValueError):
    """A picture is larger than what is read of any."""


if "PILLOW_BLOCKS_MAX" not in os.environ:
    # Pillow gives the memory of each picture back to the system, which takes as long to clear it for the next one as
    # decoding does. Four blocks of 16 MiB are what a photograph of 16 megapixels takes.
    Image.core.set_blocks_max(4)


def decode_image(
    encoded: bytes, reading: Reading = AS_OPENCV, noted: Callable[[str], object] = lambda what: None
) -> np.ndarray:
    """`decode_picture` as an array: RGB uint8 (H, W, 3)."""
    return np.asarray(decode_picture(encoded, reading, noted))


def decode_picture(
    encoded: bytes, reading: Reading = AS_OPENCV, noted: Callable[[str], object] = lambda what: None
) -> Image.Image:
    """A picture's file → RGB, turned upright as its EXIF orientation says.

    That is what `cv2.imread` does, which segment-anything's notebooks and scripts read images with: orientation
    applied, alpha dropped, 16 bits cut to the upper 8. Of several frames or pages it is the first. Raises what Pillow
    raises for what is not a whole image.

    Args:
        encoded: the file, of a kind that `picture_formats` lists, whatever it is called.
        reading: how.
        noted: is told of what came out otherwise than one may think.

    Raises:
        TooManyPixels: it has more than `reading` allows, by its header.
    """
    Image.MAX_IMAGE_PIXELS = None  # ours is compared below, before a pixel is decoded
    with Image.open(io.BytesIO(encoded), formats=format_names()) as image:
        width, height = image.size
        if width * height > reading.max_pixels:
            raise TooManyPixels(f"{width}×{height} px are more than data.max_pixels={reading.max_pixels}")
        image.load()  # where a PNG's EXIF follows its pixels it is known only now
        orientation = _orientation(image)
        if image.mode.startswith("I") or image.mode == "F":
            pixels = Image.fromarray(_eight_bits(np.asarray(image), reading, noted)).convert("RGB")
        else:
            pixels = image if image.mode == "RGB" else image.convert("RGB")
    if orientation in UPRIGHT:
        pixels = pixels.transpose(UPRIGHT[orientation])
    pixels.info = {}  # comments, profiles and the like, which Pillow would hand on to every file made of this
    return pixels


def reason_of(error: Exception) -> str:
    """An error of decoding in one line, without the memory address that makes equal reasons differ."""
    return re.sub(r" ?<_io\.BytesIO[^>]*>", "", f"{type(error).__name__}: {first_line(error)}")


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 where there is none that can be read.

    `ImageOps.exif_transpose` would also write the rest of EXIF again, which fails for much that cameras and editors
    leave there, and take what a PNG's XMP says for EXIF. A TIFF that Pillow has not turned while loading keeps its tag.
    """
    if image.format == "TIFF":
        return image.tag_v2.get(ExifTags.Base.Orientation, 1)  # type: ignore[attr-defined]
    exif = Image.Exif()
    try:
        written = image.info.get("Raw profile type exif", "").split("\n")[3:]  # ImageMagick's way, in hexadecimal
        exif.load(image.info.get("exif") or bytes.fromhex("".join(written)))
        return exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # of many kinds; what cannot be read turns nothing
        return 1


def _eight_bits(values: np.ndarray, reading: Reading, noted: Callable[[str], object]) -> np.ndarray:
    """Gray values of more than 8 bits, integers or floats (H, W) → uint8 (H, W)."""
    wide = np.nan_to_num(values.astype(np.float32))
    low, high = float(wide.min()), float(wide.max())
    if reading.sixteen_bit == "stretch":
        return ((wide - low) * (255 / (high - low) if high > low else 0)).round().astype(np.uint8)
    if values.dtype.kind == "f":
        if high <= 1:
            noted("its values go to 1 and come out black: data.sixteen_bit=stretch brings them to 255")
        return wide.clip(0, 255).astype(np.uint8)
    if high < 2**12 and high > 0:
        noted("its 16 bits never use the upper 4 and come out dark: data.sixteen_bit=stretch")
    return (values.astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
