import io
import struct

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from embeddings_cache.images.decoding import Reading, decode_image
from pictures import encoded


@pytest.mark.parametrize(
    ("kind", "mode", "tolerance"),
    [("PNG", "RGB", 0), ("PNG", "RGBA", 0), ("WEBP", "RGBA", 8), ("JPEG", "CMYK", 8), ("PNG", "P", 51)],
)
def test_colour_modes_keep_their_colours(kind: str, mode: str, tolerance: int) -> None:
    expected = np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 98} if kind == "JPEG" else {}
    image = decode_image(encoded(kind, mode, **options))
    assert (image.shape, image.dtype) == ((30, 40, 3), np.uint8)
    assert np.abs(image.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_gray_becomes_three_equal_channels(mode: str) -> None:
    image = decode_image(encoded("PNG", mode))
    assert image.shape == (30, 40, 3)
    assert np.array_equal(image, np.repeat(image[..., :1], 3, axis=2))
    assert image[0, 0, 0] < image[-1, -1, 0]


def test_alpha_is_dropped_not_blended() -> None:
    pixels = np.full((4, 4, 4), (200, 100, 50, 0), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert (decode_image(buffer.getvalue()) == (200, 100, 50)).all()


def test_a_very_wide_image_is_read() -> None:
    assert decode_image(encoded("JPEG", size=(20_000, 64))).shape == (64, 20_000, 3)


def test_sixteen_bits_become_the_upper_eight() -> None:
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    image = decode_image(buffer.getvalue())
    assert np.array_equal(image, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to view
    upright = decode_image(encoded())
    turned = decode_image(encoded(exif=exif.tobytes()))
    assert turned.shape == (40, 30, 3)
    assert np.array_equal(turned, np.rot90(upright, -1))


def exif_of(*entries: tuple[int, int, int, bytes], extra: bytes = b"") -> bytes:
    """EXIF with an orientation (6: turn by 90° clockwise) beside some entries: tag, type, count, four bytes."""
    packed = [struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)]
    packed += [struct.pack("<HHI4s", *entry) for entry in entries]
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(packed)) + b"".join(packed) + bytes(4) + extra


@pytest.mark.parametrize(
    "entry",
    [
        (0x011A, 2, 4, b"abc\0"),  # XResolution is a number, here it is text
        (0x0131, 5, 1, struct.pack("<I", 38)),  # Software is text, here it is a fraction
        (0x0202, 9, 1, struct.pack("<i", -1)),  # a length with a sign
        (0x02BC, 2, 4, b"xmp\0"),  # XMP is bytes, here it is text
        (0x8769, 4, 1, struct.pack("<I", 10**6)),  # EXIF's own directory lies behind the end
    ],
)
def test_orientation_is_applied_whatever_else_exif_says(entry: tuple[int, int, int, bytes]) -> None:
    exif = exif_of(entry, extra=bytes(64))
    image = decode_image(encoded(exif=exif))
    assert np.array_equal(image, np.rot90(decode_image(encoded()), -1))


def test_exif_that_cannot_be_read_turns_nothing() -> None:
    image = decode_image(encoded(exif=b"Exif\0\0II*\0\xff\xff"))
    assert np.array_equal(image, decode_image(encoded()))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_orientation_of_other_kinds(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"lossless": True} if kind == "WEBP" else {}
    turned = decode_image(encoded(kind, exif=exif, **options))
    assert np.array_equal(turned, np.rot90(decode_image(encoded(kind, **options)), -1))


def test_what_a_png_says_in_xmp_is_not_exif() -> None:
    """As `cv2.imread` has it."""
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    assert np.array_equal(decode_image(encoded("PNG", pnginfo=info)), decode_image(encoded("PNG")))


def test_an_orthophoto_is_no_bomb() -> None:
    huge = saved(np.zeros((9_000, 20_000), np.uint8))
    with pytest.raises(ValueError, match=r"20000×9000 px are more than data\.max_pixels=178956970"):
        decode_image(huge)
    assert decode_image(huge, Reading(max_pixels=200_000_000)).shape == (9_000, 20_000, 3)
    with pytest.raises(ValueError, match=r"40×30 px are more than data\.max_pixels=1000"):
        decode_image(encoded(), Reading(max_pixels=1000))


def saved(values: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def test_twelve_bits_in_sixteen_are_told_of_and_may_be_stretched() -> None:
    values = np.arange(100, 4100, 4, dtype=np.uint16)[:1000].reshape(25, 40)
    values = np.minimum(values, 4095)
    told: list[str] = []
    dark = decode_image(saved(values), noted=told.append)
    assert dark.max() == 15
    assert told == ["its 16 bits never use the upper 4 and come out dark: data.sixteen_bit=stretch"]
    stretched = decode_image(saved(values), Reading(sixteen_bit="stretch"), pytest.fail)
    expected = np.round((values - 100.0) * 255 / (4095 - 100)).astype(np.uint8)
    assert np.array_equal(stretched, np.repeat(expected[..., None], 3, axis=2))


def test_floats_may_be_stretched() -> None:
    values = np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)
    told: list[str] = []
    assert decode_image(saved(values, "TIFF"), noted=told.append).max() <= 1
    assert "go to 1" in told[0]
    stretched = decode_image(saved(values, "TIFF"), Reading(sixteen_bit="stretch"))
    assert (stretched.min(), stretched.max()) == (0, 255)


def test_a_programs_file_is_not_run_for_being_called_a_picture() -> None:
    """Pillow gives PostScript to Ghostscript."""
    postscript = io.BytesIO()
    Image.new("RGB", (8, 8)).save(postscript, "EPS")
    with pytest.raises(UnidentifiedImageError):
        decode_image(postscript.getvalue())


def test_a_single_pixel_is_an_image() -> None:
    assert decode_image(encoded("PNG", size=(1, 1))).shape == (1, 1, 3)
