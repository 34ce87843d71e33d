"""Which kinds of pictures can be read here."""

from contextlib import suppress
from functools import cache

from PIL import Image

COMMON = ("jpg", "jpeg", "png", "webp")
"""What SA-1B and most data sets have; where a sample has several pictures, the first of these counts."""

NO_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Of Pillow's formats those that it knows without being able to read them, and those that start another program."""

WANTING = {
    "heic": "pip install pillow-heif",
    "heif": "pip install pillow-heif",
    "avif": "pip install 'pillow>=11.3'",
}
"""What makes a kind of picture readable."""


@cache
def picture_formats() -> dict[str, str]:
    """Suffix → Pillow's name of the format, the common ones first."""
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    readable = {
        suffix.lower().removeprefix("."): name
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in NO_PICTURES
    }
    common = {suffix: readable[suffix] for suffix in COMMON if suffix in readable}
    return {**common, **{suffix: readable[suffix] for suffix in sorted(readable)}}


@cache
def picture_suffixes() -> tuple[str, ...]:
    """Suffixes of the pictures that can be read, without the dot and in lower case, the common ones first."""
    return tuple(picture_formats())


@cache
def format_names() -> tuple[str, ...]:
    """Pillow's names of the formats that may be opened, whatever a file is called."""
    return tuple(dict.fromkeys(picture_formats().values()))
