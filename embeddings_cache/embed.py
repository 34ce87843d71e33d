"""Images → rows of the cache: decoding, encoder and whatever takes the rows go on at the same time."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch

from embeddings_cache.images import Sample, Skipped, pad_pixels, resize_longest_side
from embeddings_cache.shards import CacheRow, decode_pixels, encode_pixels
from embeddings_cache.system import iterate_ahead, map_ahead
from embeddings_cache.teacher import TeacherEncoder

BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Prepared:
    """An image as the cache keeps it: `encoded`; and as the teacher sees it: `padded`, uint8 (3, S, S)."""

    key: str
    encoded: bytes
    padded: torch.Tensor
    original_size: tuple[int, int]
    input_size: tuple[int, int]
    annotation: str | None


def embedded_rows(
    encoder: TeacherEncoder, samples: Iterable[Sample], jpeg_quality: int | str, skipped: Skipped, threads: int = 1
) -> Generator[CacheRow, None, None]:
    """Rows in the order of their samples; what cannot be resized is reported through `skipped`.

    Args:
        encoder: makes the embeddings, in this thread.
        samples: are read in another thread.
        jpeg_quality: of the picture that the cache keeps, which is the one that the teacher sees.
        skipped: called in that thread.
        threads: that prepare pictures.
    """
    prepare_one = partial(prepare, size=encoder.image_size, jpeg_quality=jpeg_quality)
    prepared = map_ahead(prepare_one, samples, threads, ahead=2 * threads)
    with closing(iterate_ahead(_batches(prepared, encoder, skipped), BATCHES_AHEAD)) as batches:
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


def prepare(sample: Sample, size: int, jpeg_quality: int | str) -> Prepared | tuple[str, str]:
    """Resize, encode as the cache keeps it, and decode again: so the teacher sees the very pixels that students will.

    Returns:
        The prepared image, or its key and why it cannot be had.
    """
    try:
        resized = resize_longest_side(sample.image, size)
    except ValueError as error:
        return sample.key, str(error)
    encoded = encode_pixels(resized, jpeg_quality)
    input_size = (resized.shape[0], resized.shape[1])
    padded = pad_pixels(decode_pixels(encoded), size)
    return Prepared(sample.key, encoded, padded, sample.original_size, input_size, sample.annotation)


def _batches(
    prepared: Iterable[Prepared | tuple[str, str]], encoder: TeacherEncoder, skipped: Skipped
) -> Iterator[tuple[list[Prepared], torch.Tensor, torch.Tensor]]:
    batch: list[Prepared] = []
    for image in prepared:
        if isinstance(image, Prepared):
            batch.append(image)
        else:
            skipped(*image)
        if len(batch) >= encoder.batch_size:
            yield _stack(batch, encoder.device)
            batch = []
    if batch:
        yield _stack(batch, encoder.device)


def _stack(batch: list[Prepared], device: torch.device) -> tuple[list[Prepared], torch.Tensor, torch.Tensor]:
    pixels = torch.stack([image.padded for image in batch])
    sizes = torch.tensor([image.input_size for image in batch])
    return batch, pixels.pin_memory() if device.type == "cuda" else pixels, sizes
