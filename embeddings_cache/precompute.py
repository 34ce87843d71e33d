"""Precompute: the teacher sees every chosen image once; its embeddings go to shards."""

import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from segment_anything.modeling import Sam

from embeddings_cache.embed import embedded_rows
from embeddings_cache.encoder import TeacherEncoder
from embeddings_cache.files import TEMPORARY, sole_user, whole_file, write_json
from embeddings_cache.format import CacheIdentity, CacheInfo, images_name, read_info
from embeddings_cache.images import count_images, read_images
from embeddings_cache.overlap import available_cores, map_ahead
from embeddings_cache.preprocess import fingerprint
from embeddings_cache.progress import progress_bar
from embeddings_cache.reader import is_complete, keys_in, shard_paths
from embeddings_cache.sources import Share, assign_sources, keep_key, pick_sources
from embeddings_cache.space import check_space
from embeddings_cache.stopping import stop_on_request
from embeddings_cache.teacher import weights_sha256
from embeddings_cache.writer import ShardWriter
from students import InputError

ENOUGH_TO_JUDGE = 1000
"""Samples after which a running process may stop over `max_skipped`; before, chance decides too much."""

MOST_THREADS = 8


def cache_identity(
    sam: Sam,
    teacher_name: str,
    *,
    teacher_dtype: str,
    dtype: str,
    jpeg_quality: int | str,
    images: str | list[str],
    fraction: float,
) -> CacheIdentity:
    """What a cache made with these settings is identified by."""
    encoder = sam.image_encoder
    cells = encoder.img_size // 16
    channels = sam.prompt_encoder.embed_dim
    return CacheIdentity(
        teacher_name=teacher_name,
        teacher_sha256=weights_sha256(sam),
        teacher_dtype=teacher_dtype,
        image_size=encoder.img_size,
        embedding_shape=(channels, cells, cells),
        dtype=dtype,
        jpeg_quality=jpeg_quality,
        preprocess=fingerprint(),
        data_images=images_name(images),
        data_fraction=fraction,
    )


def precompute(
    directory: Path,
    sam: Sam,
    identity: CacheIdentity,
    find_sources: Callable[[], list[str]],
    accelerator: Accelerator,
    *,
    batch_size: int | None = None,
    compiled: bool = False,
    images_per_shard: int = 256,
    max_skipped: float = 0.01,
) -> CacheInfo:
    """Make a cache, or what is missing of it; every process of the launch calls this.

    Args:
        directory: the cache; made if need be.
        sam: the teacher, in eval mode.
        identity: from `cache_identity`.
        find_sources: gives the tars and folders, of which `identity.data_fraction` is used; called only if something
            is missing, so that a finished cache needs no tar any more.
        batch_size: images a teacher pass; None: as many as fit.
        compiled: whether the teacher goes through `torch.compile`.
        images_per_shard: rows a shard, and so what a crash costs at most.
        max_skipped: share of bad samples above which the run stops.

    Returns:
        What `cache.json` says at the end.

    Raises:
        InputError: the directory holds another cache or is in use, the disk is full or too small, no image could be
            read, or too many were bad.
        Stopped: SIGTERM or SIGINT came; all rows that were written are kept.
    """
    info = read_info(directory)
    if info is not None and (info.complete or shard_paths(directory)):  # an empty one binds nobody
        refuse_other_cache(directory, info.identity, identity)
        if is_complete(directory, info):
            return info
    rank, ranks = accelerator.process_index, accelerator.num_processes

    with ExitStack() as held:
        held.enter_context(sole_user(directory, rank))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for leftover in directory.glob(f"{TEMPORARY}*"):
                leftover.unlink()
            write_json(directory / "cache.json", CacheInfo(identity, complete=False).as_json())
        accelerator.wait_for_everyone()

        picked, key_fraction = pick_sources(find_sources(), identity.data_fraction)
        done = {key for shard in shard_paths(directory) for key in keys_in(shard, identity)}
        total: int | None = None
        if accelerator.is_main_process:
            total = count_images(picked, lambda key: keep_key(key, key_fraction))
            print(f"precompute: {check_space(directory, total and max(0, total - len(done)), identity)}")
        accelerator.wait_for_everyone()  # nobody adds a shard before all have listed them, and it will fit

        encoder = TeacherEncoder(sam, accelerator.device, identity.teacher_dtype, compiled, batch_size)
        shares = assign_sources(picked, rank, ranks, resumed=bool(done))
        skipped = SkippedSamples(max_skipped, good=len(done) // ranks)
        with progress_bar(
            accelerator, "precompute", "images", total=total and -(-total // ranks), initial=len(done) // ranks
        ) as progress:
            divided = _embed(
                shares,
                lambda key: key not in done and keep_key(key, key_fraction),
                encoder,
                ShardWriter(directory, identity, rank, images_per_shard),
                skipped,
                preparing_threads(accelerator),
                progress.update,
            )
            progress.total = progress.n
        accelerator.wait_for_everyone()
        skipped.samples = list(dict.fromkeys(gather_object(skipped.samples)))  # a divided tar is read by all
        refuse_differing(gather_object([divided]))
        if accelerator.is_main_process:
            _finish(directory, identity, skipped)
        accelerator.wait_for_everyone()
    finished = read_info(directory)
    assert finished is not None
    return finished


def _embed(
    shares: list[Share],
    wanted: Callable[[str], bool],
    encoder: TeacherEncoder,
    writer: ShardWriter,
    skipped: "SkippedSamples",
    threads: int,
    progress: Callable[[], object],
) -> dict[str, int]:
    """One process's share of the images → shards; returns `divided` of `read_images`.

    Raises:
        Stopped: a signal came.
    """
    divided: dict[str, int] = {}
    with stop_on_request() as request:

        def still_wanted(key: str) -> bool:
            request.raise_if_made()  # also while what is there already is only passed over
            return wanted(key)

        samples = read_images(shares, still_wanted, skipped, threads, divided)
        with (
            closing(embedded_rows(encoder, samples, writer.identity.jpeg_quality, skipped, threads)) as rows,
            writer,  # ends its shard before the readers end, one of which may be waiting for a download
            closing(map_ahead(writer.write, rows, threads=1, ahead=4 * encoder.batch_size)) as written,
        ):
            for _ in written:
                skipped.good += 1
                progress()
                request.raise_if_made()
    return divided


def refuse_other_cache(directory: Path, found: CacheIdentity, expected: CacheIdentity) -> None:
    """Raise `InputError`, naming what differs, unless the cache found is the one expected."""
    if differences := found.differences(expected):
        raise InputError(f"the cache at {directory} is another one: {'; '.join(differences)}. Choose another cache.dir")


class SkippedSamples:
    """Collects what is passed over, and stops a process that passes over too much; called with key and reason.

    `good` counts the images that were not.
    """

    def __init__(self, most: float, good: int) -> None:
        self.most = most
        self.good = good
        self.samples: list[tuple[str, str]] = []

    def __call__(self, key: str, reason: str) -> None:
        self.samples.append((key, reason))
        if len(self.samples) + self.good >= ENOUGH_TO_JUDGE:
            self.refuse_too_many()

    def refuse_too_many(self) -> None:
        """Raise `InputError` if their share is above `most` (`data.max_skipped`)."""
        seen = len(self.samples) + self.good
        if len(self.samples) > self.most * seen:
            raise InputError(
                f"{len(self.samples)} of {seen} samples are bad, more than data.max_skipped={self.most:g}"
                + self.commonest()
            )

    def commonest(self) -> str:
        """The commonest reason with an example, to go on a line."""
        if not self.samples:
            return ""
        (reason, count), *_ = Counter(reason for _, reason in self.samples).most_common(1)
        example = next(key for key, why in self.samples if why == reason)
        return f"; the commonest reason ({count}×, as in {example}): {reason}"


def refuse_differing(counts: list[dict[str, int]]) -> None:
    """Raise `InputError` where processes that divide a source have found different images in it."""
    for source in counts[0]:
        if len({found.get(source) for found in counts}) > 1:
            raise InputError(
                f"processes found different images in {source}: {[found.get(source) for found in counts]}. Has it "
                "changed, or can one of them not read it? The same command looks for what is missing"
            )


def preparing_threads(accelerator: Accelerator) -> int:
    """Threads that decode and that resize pictures: a share of the cores for a GPU, one beside a teacher on the CPU."""
    if accelerator.device.type == "cpu":
        return 1
    return max(1, min(MOST_THREADS, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _finish(directory: Path, identity: CacheIdentity, skipped: SkippedSamples) -> None:
    """Write `skipped.jsonl`, judge the share of bad samples, and declare the cache complete."""
    shards = shard_paths(directory)
    rows = Counter(key for shard in shards for key in keys_in(shard, identity))
    skipped.samples += [(key, "key seen before") for key, count in rows.items() if count > 1]
    skipped.good = len(rows)
    lines = [json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in skipped.samples]
    with whole_file(directory / "skipped.jsonl") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    if not rows:
        raise InputError(f"no image could be read from {identity.data_images!r}{skipped.commonest()}")
    skipped.refuse_too_many()
    info = CacheInfo(identity, complete=True, images=len(rows), skipped=len(skipped.samples), shards=len(shards))
    write_json(directory / "cache.json", info.as_json())
