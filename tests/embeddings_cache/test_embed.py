import io

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from embeddings_cache.embed import Preparation, Prepared
from embeddings_cache.images import Decoder, Encoded, decode_image, resize_longest_side
from embeddings_cache.shards import encode_pixels
from pictures import encoded


def talkative(kind: str) -> bytes:
    """A picture whose file says all that there is to say beside its pixels."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(encoded("PNG", size=(300, 200))))
    if kind == "JPEG":
        picture.save(buffer, kind, comment=b"by hand", icc_profile=profile, xmp=b"<x/>", dpi=(300, 300))
    else:
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", "by hand")
        picture.save(buffer, kind, pnginfo=text, icc_profile=profile, transparency=(1, 2, 3), dpi=(300, 300))
    return buffer.getvalue()


@pytest.mark.parametrize("quality", [95, "png"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_cache_keeps_pixels_and_nothing_else_of_a_file(kind: str, quality: int | str) -> None:
    picture = talkative(kind)
    prepared = Preparation(Decoder(), 128, quality)(Encoded("a", kind.lower(), picture, None))
    assert isinstance(prepared, Prepared)
    resized = resize_longest_side(decode_image(picture), 128)
    assert prepared.encoded == encode_pixels(resized, quality)
    if quality == "png":
        assert np.array_equal(prepared.pixels, resized.transpose(2, 0, 1))
