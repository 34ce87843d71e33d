import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from torch import nn

from embeddings_cache.images.preprocessing import (
    PIXEL_MEAN,
    fingerprint,
    normalize,
    pad_pixels,
    resize_longest_side,
    to_encoder_input,
)
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.teacher.toy import load_toy_teacher


class Recorder(nn.Module):
    """An image encoder that keeps what it was given."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.img_size = image_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return torch.zeros(len(x), 64, 8, 8)


def photograph(height: int, width: int) -> np.ndarray:
    """A picture with structure at every scale, cropped from a generated scene."""
    return generate_scene(np.random.default_rng(height), max(64, *(int(s / 0.65) + 1 for s in (height, width))))[0][
        :height, :width
    ]


@pytest.mark.parametrize("image_size", [128, 1024])
@pytest.mark.parametrize(
    ("height", "width"),
    [(321, 481), (481, 321), (300, 450), (450, 300), (128, 128), (64, 64), (31, 200), (1, 1), (1024, 700)],
)
def test_equals_sam_predictors_input_to_the_last_bit(height: int, width: int, image_size: int) -> None:
    image = photograph(height, width)
    assert image.shape == (height, width, 3)
    sam = load_toy_teacher(128)
    sam.image_encoder = Recorder(image_size)
    predictor = SamPredictor(sam)
    predictor.set_image(image)

    pixels = resize_longest_side(image, image_size)
    ours = to_encoder_input(pad_pixels(pixels, image_size)[None], torch.tensor([pixels.shape[:2]]))

    assert ours.dtype == torch.float32
    assert pixels.shape[:2] == predictor.input_size
    assert torch.equal(ours, sam.image_encoder.seen)


def test_a_batch_is_its_images_one_by_one() -> None:
    pictures = [resize_longest_side(photograph(h, w), 128) for h, w in ((90, 60), (60, 90), (70, 70))]
    pixels = torch.stack([pad_pixels(picture, 128) for picture in pictures])
    pixels[0, :, :, 100:] = 255  # what lies outside the image must not matter
    sizes = torch.tensor([picture.shape[:2] for picture in pictures])
    batch = to_encoder_input(pixels, sizes)
    for number, picture in enumerate(pictures):
        alone = to_encoder_input(pad_pixels(picture, 128)[None], sizes[number : number + 1])
        assert torch.equal(batch[number], alone[0])


def test_mean_colour_normalises_to_zero() -> None:
    padding = torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert torch.equal(normalize(padding), torch.zeros(1, 3, 4, 4))


def test_an_image_too_elongated_to_resize_is_refused() -> None:
    with pytest.raises(ValueError, match="3000×1 px is too elongated"):
        resize_longest_side(np.zeros((1, 3000, 3), np.uint8), 128)


def test_fingerprint_names_this_preprocessing() -> None:
    # A change here means that caches made before no longer match: bump it knowingly.
    assert fingerprint() == "3db68214258797b4"
