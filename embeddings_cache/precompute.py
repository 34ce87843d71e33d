"""Precompute: the teacher sees every chosen image once; its embeddings go to shards."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from segment_anything.modeling import Sam

from embeddings_cache.codec import CacheRow, decode_pixels, encode_pixels
from embeddings_cache.files import TEMPORARY, sole_user, whole_file, write_json
from embeddings_cache.format import CacheIdentity, CacheInfo, images_name, read_info
from embeddings_cache.images import Sample, count_images, read_images
from embeddings_cache.preprocess import fingerprint, pad_pixels, resize_longest_side
from embeddings_cache.progress import progress_bar
from embeddings_cache.reader import is_complete, keys_in, shard_paths
from embeddings_cache.sources import assign_sources, keep_key, pick_sources
from embeddings_cache.tars import Skipped
from embeddings_cache.teacher import encode, weights_sha256
from embeddings_cache.writer import ShardWriter
from students import InputError

ENOUGH_TO_JUDGE = 1000
"""Samples after which a running process may stop over `max_skipped`; before, chance decides too much."""


def cache_identity(
    sam: Sam,
    teacher_name: str,
    *,
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
    batch_size: int = 1,
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
        batch_size: images a teacher pass.
        images_per_shard: rows a shard, and so what a crash costs at most.
        max_skipped: share of bad samples above which the run stops.

    Returns:
        What `cache.json` says at the end.

    Raises:
        InputError: the directory holds another cache or is in use, no image could be read, or too many were bad.
    """
    info = read_info(directory)
    if info is not None and (info.complete or shard_paths(directory)):  # an empty one binds nobody
        refuse_other_cache(directory, info.identity, identity)
        if is_complete(directory, info):
            return info
    ranks = accelerator.num_processes

    with ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(sole_user(directory))
            for leftover in directory.glob(f"{TEMPORARY}*"):
                leftover.unlink()
            write_json(directory / "cache.json", CacheInfo(identity, complete=False).as_json())
        accelerator.wait_for_everyone()

        picked, key_fraction = pick_sources(find_sources(), identity.data_fraction)
        shares = assign_sources(picked, accelerator.process_index, ranks)
        done = {key for shard in shard_paths(directory) for key in keys_in(shard, identity)}
        accelerator.wait_for_everyone()  # nobody adds a shard before all have listed them
        skipped: list[tuple[str, str]] = []
        written = 0

        def chosen(key: str) -> bool:
            return keep_key(key, key_fraction)

        def skip(key: str, reason: str) -> None:
            skipped.append((key, reason))
            good = written + len(done) // ranks
            if len(skipped) + good >= ENOUGH_TO_JUDGE:
                _refuse_too_many_skipped(skipped, good, max_skipped)

        samples = read_images(shares, lambda key: key not in done and chosen(key), skip)
        progress = progress_bar(
            accelerator,
            "precompute",
            "images",
            total=count_images(shares, chosen) if accelerator.is_main_process else None,
            initial=len(done) // ranks,
        )
        sam.to(accelerator.device)
        with progress, ShardWriter(directory, identity, accelerator.process_index, images_per_shard) as writer:
            for row in embedded_rows(sam, samples, identity.jpeg_quality, batch_size, skip):
                writer.write(row)
                written += 1
                progress.update()
            progress.total = progress.n
        accelerator.wait_for_everyone()
        every_skipped = gather_object(skipped)
        if accelerator.is_main_process:
            _finish(directory, identity, every_skipped, max_skipped)
        accelerator.wait_for_everyone()
    finished = read_info(directory)
    assert finished is not None
    return finished


def embedded_rows(
    sam: Sam,
    samples: Iterable[Sample],
    jpeg_quality: int | str,
    batch_size: int,
    skipped: Skipped,
) -> Iterator[CacheRow]:
    """Images → rows: resize, encode as the cache keeps it, decode again, and only then show it to the teacher.

    So the teacher sees the very pixels that the student will. What cannot be resized is reported through `skipped`.
    """
    resized = _resized(samples, sam.image_encoder.img_size, skipped)
    while batch := list(islice(resized, batch_size)):
        encoded = [encode_pixels(pixels, jpeg_quality) for _, pixels in batch]
        pictures = [decode_pixels(picture) for picture in encoded]
        sizes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
        padded = torch.stack([pad_pixels(picture, sam.image_encoder.img_size) for picture in pictures])
        embeddings = encode(sam, padded, torch.tensor(sizes)).half().cpu().numpy()
        for (sample, _), embedding, picture, size in zip(batch, embeddings, encoded, sizes, strict=True):
            yield CacheRow(sample.key, embedding, picture, sample.original_size, size, sample.annotation)


def _resized(samples: Iterable[Sample], size: int, skipped: Skipped) -> Iterator[tuple[Sample, np.ndarray]]:
    for sample in samples:
        try:
            yield sample, resize_longest_side(sample.image, size)
        except ValueError as error:
            skipped(sample.key, str(error))


def refuse_other_cache(directory: Path, found: CacheIdentity, expected: CacheIdentity) -> None:
    """Raise `InputError`, naming what differs, unless the cache found is the one expected."""
    if differences := found.differences(expected):
        raise InputError(f"the cache at {directory} is another one: {'; '.join(differences)}. Choose another cache.dir")


def _finish(directory: Path, identity: CacheIdentity, skipped: list[tuple[str, str]], max_skipped: float) -> None:
    shards = shard_paths(directory)
    rows = Counter(key for shard in shards for key in keys_in(shard, identity))
    skipped += [(key, "key seen before") for key, count in rows.items() if count > 1]
    images = len(rows)
    lines = [json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in skipped]
    with whole_file(directory / "skipped.jsonl") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    if not images:
        raise InputError(f"no image could be read from {identity.data_images!r}" + _commonest(skipped))
    _refuse_too_many_skipped(skipped, images, max_skipped)
    info = CacheInfo(identity, complete=True, images=images, skipped=len(skipped), shards=len(shards))
    write_json(directory / "cache.json", info.as_json())


def _refuse_too_many_skipped(skipped: list[tuple[str, str]], good: int, max_skipped: float) -> None:
    share = len(skipped) / (len(skipped) + good)
    if share > max_skipped:
        raise InputError(
            f"{len(skipped)} of {len(skipped) + good} samples are bad, more than data.max_skipped={max_skipped:g}"
            + _commonest(skipped)
        )


def _commonest(skipped: list[tuple[str, str]]) -> str:
    if not skipped:
        return ""
    (reason, count), *_ = Counter(reason for _, reason in skipped).most_common(1)
    example = next(key for key, why in skipped if why == reason)
    return f"; the commonest reason ({count}×, as in {example}): {reason}"
