"""The whole way of a picture, from JPEG to shard, against the encoder alone: does the encoder ever wait?"""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from distill.benchmark.cache import made_up_identity
from distill.benchmark.timing import NO_RATIO, interleave, timed
from embeddings_cache.images import Share, SkippedSamples
from embeddings_cache.precompute import embed_shares, preparing_threads
from embeddings_cache.shards import CacheIdentity, ShardWriter, encode_pixels
from embeddings_cache.system import map_ahead
from embeddings_cache.teacher import TeacherEncoder

ALONE, WHOLE = "encoder alone", "from JPEG to shard"


def pipeline_row(encoder: TeacherEncoder, images: int, rounds: int) -> dict[str, Any]:
    """Rates of pictures of SA-1B's size that are read, decoded, resized, embedded and written.

    Args:
        images: pictures a round.

    Returns:
        Among others `of_encoder_alone`: the share of the rate that the encoder has when all is at hand.
    """
    side, batch = encoder.image_size, encoder.batch_size
    pixels, sizes = torch.zeros(batch, 3, side, side, dtype=torch.uint8), torch.tensor([[side * 2 // 3, side]] * batch)
    if encoder.device.type == "cuda":
        pixels = pixels.pin_memory()
    channels, height, width = encoder(pixels, sizes).shape[1:]
    identity = made_up_identity((channels, height, width), "float16", side)
    with TemporaryDirectory(prefix="pipeline-benchmark-") as scratch:
        pictures = Path(scratch) / "pictures"
        write_pictures(pictures, images)
        subjects: dict[str, Callable[[], object]] = {
            ALONE: partial(embed_again, encoder, pixels, sizes, -(-images // batch)),
            WHOLE: partial(embed_folder, encoder, pictures, identity),
        }
        times = interleave({name: timed(run, encoder.device) for name, run in subjects.items()}, rounds, ALONE)
    return {
        **times[WHOLE].as_json(),
        **NO_RATIO,  # its baseline is not that of the rows beside it
        "images_per_s": round(images / times[WHOLE].median, 3),
        "of_encoder_alone": times[WHOLE].speed_up,
    }


def embed_again(encoder: TeacherEncoder, pixels: torch.Tensor, sizes: torch.Tensor, times: int) -> None:
    """The same batch so many times, each begun before the one before is fetched."""
    with closing(map_ahead(lambda fetch: fetch(), (encoder.begin(pixels, sizes) for _ in range(times)), 1, 2)) as done:
        for _ in done:
            pass


def embed_folder(encoder: TeacherEncoder, pictures: Path, identity: CacheIdentity) -> None:
    """Make the shards of a folder of pictures as precompute does; they are removed again."""
    with TemporaryDirectory(dir=pictures.parent) as directory:
        embed_shares(
            [Share(str(pictures))],
            wanted=lambda key: True,
            encoder=encoder,
            writer=ShardWriter(Path(directory), identity, 0, 256),
            skipped=SkippedSamples(Path(directory) / "skipped.jsonl", most=0),
            threads=preparing_threads(encoder.device),
            progress=lambda: None,
        )


def write_pictures(directory: Path, images: int) -> None:
    """The same JPEG under so many names: 2250 × 1500 pixels and 1.1 MB, as most of SA-1B's."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(255 * rng.random((1, 3, 62, 93), dtype=np.float32))
    smooth = interpolate(coarse, size=(1500, 2250), mode="bicubic")[0].permute(1, 2, 0).numpy()
    encoded = encode_pixels((smooth + 8 * rng.standard_normal(smooth.shape)).clip(0, 255).astype(np.uint8), 90)
    for number in range(images):
        (directory / f"sa_{number}.jpg").write_bytes(encoded)
