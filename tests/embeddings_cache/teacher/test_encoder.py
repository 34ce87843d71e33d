"""The fast encoder against segment-anything's own."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import nn

from embeddings_cache.embed import embedded_rows, prepare
from embeddings_cache.images.preprocessing import pad_pixels, to_encoder_input
from embeddings_cache.images.samples import Sample
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.teacher import attention
from embeddings_cache.teacher.encoder import TeacherEncoder, resolve_compile
from embeddings_cache.teacher.loading import load_teacher, weights_sha256
from embeddings_cache.teacher.toy import load_toy_teacher
from embeddings_cache.teacher.vit import encode_image, fuse_attention
from students import InputError

CPU = torch.device("cpu")


def random_vit(**options: object) -> ImageEncoderViT:
    """A small encoder all of whose weights count, positions included; windows of 14 do not divide its 20 × 20 cells."""
    settings = {"img_size": 320, "embed_dim": 64, "depth": 4, "num_heads": 4, "out_chans": 32, "window_size": 14}
    settings |= {"use_rel_pos": True, "global_attn_indexes": (1, 3), "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    torch.manual_seed(0)
    encoder = ImageEncoderViT(**{**settings, **options})
    for name, parameter in encoder.named_parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 and "rel_pos" not in name else 0.5)
    return encoder.eval()


@pytest.mark.parametrize("options", [{}, {"use_rel_pos": False}, {"window_size": 0}, {"qkv_bias": False}])
@torch.no_grad()
def test_it_computes_what_segment_anything_computes(options: dict) -> None:
    encoder = random_vit(**options)
    pixels = torch.randn(2, 3, 320, 320)
    expected = encoder(pixels)
    names = list(encoder.state_dict())
    fuse_attention(encoder)
    assert sorted(encoder.state_dict()) == sorted(names)
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(encode_image(encoder, pixels, torch.float32), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5


@pytest.mark.parametrize("way", [attention.folded_attention, attention.masked_attention, attention.sliced_attention])
@pytest.mark.parametrize("scores", [1, 3 * 6 * 4 * 9 * 4 * 9, 1 << 24])
@torch.no_grad()
def test_every_way_is_the_attention_with_a_full_matrix(
    way: Callable[..., torch.Tensor], scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in slices of one row, and of three windows, which do not divide the seven."""
    monkeypatch.setattr(attention, "SCORES_AT_A_TIME", scores)
    torch.manual_seed(0)
    count, heads, height, width, size = 7, 6, 4, 9, 16
    query, key, value = torch.randn(3, count, heads, height * width, size)
    rows, columns = torch.randn(height, height, size), torch.randn(width, width, size)
    grid = query.view(count, heads, height, width, size)
    by_row, by_column = (torch.einsum(f"nahwc,{a}kc->nahwk", grid, r) for a, r in (("h", rows), ("w", columns)))
    scored = (query * size**-0.5) @ key.mT
    scored += (by_row[..., None] + by_column[..., None, :]).reshape(scored.shape)
    expected = scored.softmax(-1) @ value
    torch.testing.assert_close(way(query, key, value, by_row, by_column), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_matter_to_that_comparison() -> None:
    encoder = random_vit()
    pixels = torch.randn(1, 3, 320, 320)
    expected = encoder(pixels)
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name:
            parameter.zero_()
    assert (encoder(pixels) - expected).abs().max() > 0.1


def test_the_loaded_teacher_is_fused_and_keeps_its_digest() -> None:
    plain, fused = load_toy_teacher(128), load_teacher("toy", None, 128)
    assert weights_sha256(fused) == weights_sha256(plain)
    pixels = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(fused.image_encoder(pixels), plain.image_encoder(pixels), atol=1e-4, rtol=0)
    assert type(fused.image_encoder.blocks[0]) is not type(plain.image_encoder.blocks[0])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    images = [generate_scene(np.random.default_rng(seed), 128)[0] for seed in range(5)]
    return torch.stack([pad_pixels(image, 128) for image in images]), torch.tensor([i.shape[:2] for i in images])


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 1e-5), ("bfloat16", 2e-2), ("float16", 4e-3)])
def test_precisions_stay_close(dtype: str, largest: float, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    with torch.no_grad():
        expected = load_toy_teacher(128).image_encoder(to_encoder_input(*batch))
    found = TeacherEncoder(load_teacher("toy", None, 128), CPU, dtype)(*batch)
    assert found.dtype == torch.float32
    assert (found - expected).norm() / expected.norm() < largest


class LittleMemory(nn.Module):
    """An encoder whose memory holds two images."""

    def __init__(self, encoder: nn.Module, most: int) -> None:
        super().__init__()
        self.encoder, self.most, self.seen = encoder, most, []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(pixels))
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError
        return self.encoder(pixels)


def with_little_memory(sam: Sam, most: int) -> LittleMemory:
    little = LittleMemory(sam.image_encoder.patch_embed, most)
    sam.image_encoder.patch_embed = little
    return little


def test_the_batch_is_halved_until_it_fits(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected = TeacherEncoder(load_teacher("toy", None, 128), CPU)(*batch)
    sam = load_teacher("toy", None, 128)
    little = with_little_memory(sam, 2)
    encoder = TeacherEncoder(sam, CPU, batch_size=5)
    torch.testing.assert_close(encoder(*batch), expected, atol=1e-5, rtol=0)
    assert encoder.batch_size == 2
    assert little.seen == [5, 3, 2, 2, 1]


def test_not_even_one_image_fits(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    sam = load_teacher("toy", None, 128)
    with_little_memory(sam, 0)
    with pytest.raises(InputError, match="one image of 128 px does not fit into cpu"):
        TeacherEncoder(sam, CPU, batch_size=5)(*batch)


def test_overflow_is_an_error() -> None:
    sam = load_teacher("toy", None, 128)
    with torch.no_grad():
        sam.image_encoder.blocks[0].mlp.lin2.bias.fill_(1e6)
    pictures = [Image.fromarray(generate_scene(np.random.default_rng(n), 128)[0]) for n in range(2)]
    prepared = [prepare(Sample(str(n), picture, None), 128, 95) for n, picture in enumerate(pictures)]
    with pytest.raises(InputError, match=r"torch\.float16 overflows .* take teacher\.dtype=bfloat16"):
        list(embedded_rows(TeacherEncoder(sam, CPU, "float16"), prepared))


@pytest.mark.parametrize(
    ("setting", "device", "images", "expected"),
    [
        ("auto", "cuda", 1999, False), ("auto", "cuda", 2000, True), ("auto", "cuda", None, True),
        ("auto", "cpu", None, False), (True, "cpu", 1, True), (False, "cuda", None, False),
    ],
)  # fmt: skip
def test_auto_compiles_where_it_pays(setting: bool | str, device: str, images: int | None, expected: bool) -> None:
    assert resolve_compile(setting, torch.device(device), images) is expected


def test_what_cannot_be_compiled_goes_on_without(
    batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    expected = TeacherEncoder(load_teacher("toy", None, 128), CPU, batch_size=2)(*batch)
    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    encoder = TeacherEncoder(load_teacher("toy", None, 128), CPU, compiled=True, batch_size=2)
    line = "the encoder could not be compiled, and does without: Failed to find C compiler."
    assert encoder.compile_or_not() == line
    assert torch.equal(encoder(*batch), expected)


@pytest.mark.slow
def test_compiled_it_computes_the_same(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Also a last batch with fewer images, for which nothing is compiled again."""
    expected = TeacherEncoder(load_teacher("toy", None, 128), CPU)(*batch)
    encoder = TeacherEncoder(load_teacher("toy", None, 128), CPU, compiled=True, batch_size=2)
    assert encoder.compile_or_not().startswith("the encoder was compiled in ")
    torch.testing.assert_close(encoder(*batch), expected, atol=1e-4, rtol=0)
