"""Images → rows of the cache: decoding, encoder and whatever takes the rows go on at the same time."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from embeddings_cache.images import Bad, Decoder, Encoded, Sample, pad_pixels, resize_picture
from embeddings_cache.shards import CacheRow, decode_pixels, encode_pixels
from embeddings_cache.system import iterate_ahead, map_ahead
from embeddings_cache.teacher import TeacherEncoder

BATCHES_AHEAD = 2


class Encoder(Protocol):
    """What `TeacherEncoder` is to the rest."""

    @property
    def image_size(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def begin(self, pixels: torch.Tensor, input_size: torch.Tensor) -> Callable[[], torch.Tensor]: ...


@dataclass(frozen=True)
class Prepared:
    """An image as the cache keeps it: `encoded`; and as the teacher sees it: `pixels`, RGB uint8 (3, h, w)."""

    key: str
    encoded: bytes
    pixels: np.ndarray
    original_size: tuple[int, int]
    annotation: str | None
    notes: tuple[str, ...] = ()

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width after resizing."""
        return self.pixels.shape[1], self.pixels.shape[2]


@dataclass(frozen=True)
class Preparation:
    """Files → an image that the teacher can take: what workers do.

    Args:
        decoder: makes a sample of the files.
        size: longest side in pixels.
        jpeg_quality: of the picture that the cache keeps, which is the one that the teacher sees.
    """

    decoder: Decoder
    size: int
    jpeg_quality: int | str

    def __call__(self, encoded: Encoded) -> Prepared | Bad:
        """The prepared image, or its key and why it cannot be had."""
        sample = self.decoder(encoded)
        return prepare(sample, self.size, self.jpeg_quality) if isinstance(sample, Sample) else sample


def prepare(sample: Sample, size: int, jpeg_quality: int | str) -> Prepared | Bad:
    """Resize, encode as the cache keeps it, and decode again: so the teacher sees the very pixels that students will.

    Returns:
        The prepared image, or its key and why it cannot be had.
    """
    try:
        resized = resize_picture(sample.picture, size)
    except ValueError as error:
        return sample.key, str(error)
    encoded = encode_pixels(resized, jpeg_quality)
    pixels = np.ascontiguousarray(decode_pixels(encoded).transpose(2, 0, 1))
    return Prepared(sample.key, encoded, pixels, sample.original_size, sample.annotation, sample.notes)


def embedded_rows(encoder: Encoder, prepared: Iterable[Prepared]) -> Generator[CacheRow, None, None]:
    """Rows in the order of their images.

    Args:
        encoder: makes the embeddings, in this thread.
        prepared: are taken in another thread.
    """
    with closing(iterate_ahead(_batches(prepared, encoder), BATCHES_AHEAD)) as batches:
        begun = ((batch, encoder.begin(pixels, sizes)) for batch, pixels, sizes in batches)
        # A GPU has its next batch before the one before is fetched.
        with closing(map_ahead(_rows, begun, threads=1, ahead=2 if encoder.device.type == "cuda" else 1)) as fetched:
            for rows in fetched:
                yield from rows


def embed_again(encoder: TeacherEncoder, row: CacheRow) -> torch.Tensor:
    """What the teacher makes of a cached row's picture: float32 (C, h, w), on the CPU."""
    pixels = pad_pixels(row.pixels(), encoder.image_size)[None]
    return encoder(pixels, torch.tensor([row.input_size]))[0].cpu()


def _rows(begun: tuple[list[Prepared], Callable[[], torch.Tensor]]) -> list[CacheRow]:
    batch, fetch = begun
    return [
        CacheRow(image.key, embedding, image.encoded, image.original_size, image.input_size, image.annotation)
        for image, embedding in zip(batch, fetch().numpy(), strict=True)
    ]


def _batches(
    prepared: Iterable[Prepared], encoder: Encoder
) -> Iterator[tuple[list[Prepared], torch.Tensor, torch.Tensor]]:
    batch: list[Prepared] = []
    for image in prepared:
        batch.append(image)
        if len(batch) >= encoder.batch_size:
            yield stack(batch, encoder)
            batch = []
    if batch:
        yield stack(batch, encoder)


def stack(batch: list[Prepared], encoder: Encoder) -> tuple[list[Prepared], torch.Tensor, torch.Tensor]:
    """A batch with its pixels, uint8 (B, 3, S, S) and padded, and its input sizes."""
    side, on_gpu = encoder.image_size, encoder.device.type == "cuda"
    pixels = torch.zeros(len(batch), 3, side, side, dtype=torch.uint8, pin_memory=on_gpu)
    for padded, image in zip(pixels, batch, strict=True):
        height, width = image.input_size
        padded[:, :height, :width] = torch.from_numpy(image.pixels)
    return batch, pixels, torch.tensor([image.input_size for image in batch])
