"""The whole way of a picture, from JPEG to shard: does an encoder wait for it, and how fast is it without one?"""

import pickle
import resource
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from distill.benchmark.cache import made_up_identity
from distill.benchmark.machine import machine
from distill.benchmark.timing import NO_RATIO, interleave, spread, timed
from embeddings_cache.embed import Encoder, prepare, stack
from embeddings_cache.images import (
    Decoder,
    Encoded,
    Sample,
    Share,
    SkippedSamples,
    decode_picture,
    resize_picture,
)
from embeddings_cache.precompute import embed_shares, worker_count
from embeddings_cache.shards import CacheIdentity, CacheRow, ShardWriter, decode_pixels, encode_pixels
from embeddings_cache.system import available_cores, map_ahead
from embeddings_cache.teacher import TeacherEncoder
from students import InputError

ALONE, WHOLE = "encoder alone", "from JPEG to shard"
ROWS_PER_SHARD = 256
QUALITY = 95
CPU = torch.device("cpu")


@dataclass
class PipelineBenchmark:
    images: int = 64  # photographs of 2250 x 1500 pixels a round
    workers: str = "auto"  # processes that read them, after commas, 0: threads; auto: 0, 1, 2, 4, ... up to the cores
    image_size: int = 1024  # side of the teacher's input; the embedding is 256 x S/16 x S/16
    batch_size: int = 8  # images that are stacked
    rounds: int = 5  # of each, in turn
    dir: str | None = None  # where to make the shards (they are removed again); default: the system's temporary folder
    out: str = "benchmark.json"  # where the numbers go


class NoEncoder:
    """Stands for a teacher that costs nothing: the same embeddings whatever it sees."""

    device = CPU

    def __init__(self, image_size: int, batch_size: int) -> None:
        self.image_size = image_size
        self.batch_size = batch_size
        cells = image_size // 16
        self.embeddings = torch.randn(batch_size, 256, cells, cells, generator=torch.Generator().manual_seed(0)).half()

    def begin(self, pixels: torch.Tensor, input_size: torch.Tensor) -> Callable[[], torch.Tensor]:
        """As `TeacherEncoder.begin`."""
        return lambda: self.embeddings[: len(pixels)]


def benchmark_pipeline(settings: PipelineBenchmark) -> dict[str, Any]:
    """Measure, and return what goes to `benchmark.json`: rates by number of workers, CPU time by step.

    Raises:
        InputError: a setting that makes no sense.
    """
    counts = worker_counts(settings.workers)
    encoder = NoEncoder(settings.image_size, settings.batch_size)
    with TemporaryDirectory(dir=settings.dir, prefix="pipeline-benchmark-") as scratch:
        pictures = Path(scratch) / "pictures"
        write_pictures(pictures, settings.images)
        channels, height, width = encoder.embeddings.shape[1:]
        identity = made_up_identity((channels, height, width), "float16", settings.image_size)
        spent: dict[str, list[CpuTime]] = {_label(count): [] for count in counts}

        def measured(count: int) -> None:
            before = CpuTime.now()
            embed_folder(encoder, pictures, identity, count)
            spent[_label(count)].append(CpuTime.now() - before)

        def per_image(label: str, part: str) -> float:
            return round(1e3 * median(getattr(time, part) for time in spent[label]) / settings.images, 2)

        subjects = {_label(count): timed(partial(measured, count), CPU) for count in counts}
        baseline = _label(counts[0])
        times = interleave(subjects, settings.rounds, baseline)
        rows = [
            {
                "name": f"{settings.images} photographs {WHOLE}",
                "backend": label,
                **took.as_json(),
                "images_per_s": round(settings.images / took.median, 3),
                "cpu_ms_per_image": per_image(label, "all"),
                "own_cpu_ms_per_image": per_image(label, "own"),
            }
            for label, took in times.items()
        ]
        rows += step_rows(next(pictures.iterdir()).read_bytes(), encoder, identity, Path(scratch), settings.rounds)
    return {"settings": vars(settings), "machine": machine(CPU), "baseline": baseline, "rows": rows}


def worker_counts(asked: str) -> list[int]:
    """What `workers` says.

    Raises:
        InputError: it says nothing of the kind.
    """
    if asked == "auto":
        return [0, *(1 << power for power in range(available_cores().bit_length()))]
    counts = [int(word) if word.isdecimal() else -1 for word in str(asked).split(",")]
    if min(counts) < 0 or len(set(counts)) < len(counts):
        raise InputError(f"workers={asked} is neither auto nor different numbers after commas, 0 for threads")
    return counts


def _label(workers: int) -> str:
    return f"{workers} worker{'' if workers == 1 else 's'}" if workers else "threads"


def step_rows(
    picture: bytes, encoder: NoEncoder, identity: CacheIdentity, scratch: Path, rounds: int
) -> list[dict[str, Any]]:
    """What each step of a photograph takes by itself, on one core; the last four are the reading process's own."""
    side = encoder.image_size
    encoded = Encoded("sa_0", "jpg", picture, None)
    opened = decode_picture(picture)
    resized = resize_picture(opened, side)
    kept = encode_pixels(resized, QUALITY)
    prepared = prepare(Sample("sa_0", opened, None), side, QUALITY)
    assert not isinstance(prepared, tuple)
    sent, returned = pickle.dumps(encoded, -1), pickle.dumps(prepared, -1)
    embedding = encoder.embeddings[0].numpy()
    row = CacheRow("sa_0", embedding, kept, prepared.original_size, prepared.input_size, "x" * 70_000)
    with ShardWriter(scratch, identity, 0, ROWS_PER_SHARD) as writer:
        steps: dict[str, tuple[int, Callable[[], object]]] = {
            "decode": (1, lambda: Decoder()(encoded)),
            "resize": (1, lambda: resize_picture(opened, side)),
            "encode as kept": (1, lambda: encode_pixels(resized, QUALITY)),
            "decode again": (1, lambda: np.ascontiguousarray(decode_pixels(kept).transpose(2, 0, 1))),
            "hand to a worker": (1, lambda: pickle.dumps(encoded, -1)),
            "take from a worker": (1, lambda: pickle.loads(returned)),
            "stack": (encoder.batch_size, lambda: stack([prepared] * encoder.batch_size, encoder)),
            "write": (1, lambda: writer.write(row)),
        }
        assert pickle.loads(sent) == encoded
        rows = []
        for name, (images, step) in steps.items():
            turn = timed(step, CPU)
            seconds = [second / images for _ in range(10 * rounds) for second in turn()]
            rows.append({"name": "a photograph", "backend": name, **spread(seconds), **NO_RATIO})
        writer.drop()
    return rows


@dataclass(frozen=True)
class CpuTime:
    """Seconds of this process, all of its threads, and with those of the processes that it started and that ended."""

    own: float
    all: float

    @classmethod
    def now(cls) -> "CpuTime":
        """Since the beginning."""
        usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        own, ended = (usage.ru_utime + usage.ru_stime for usage in usages)
        return cls(own, own + ended)

    def __sub__(self, other: "CpuTime") -> "CpuTime":
        return CpuTime(self.own - other.own, self.all - other.all)


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
            WHOLE: partial(embed_folder, encoder, pictures, identity, worker_count(encoder.device)),
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


def embed_folder(encoder: Encoder, pictures: Path, identity: CacheIdentity, workers: int) -> None:
    """Make the shards of a folder of pictures as precompute does; they are removed again."""
    with TemporaryDirectory(dir=pictures.parent) as directory:
        embed_shares(
            [Share(str(pictures))],
            wanted=lambda key: True,
            encoder=encoder,
            writer=ShardWriter(Path(directory), identity, 0, ROWS_PER_SHARD),
            skipped=SkippedSamples(Path(directory) / "skipped.jsonl", most=0),
            progress=lambda: None,
            decoder=Decoder(),
            workers=workers,
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
