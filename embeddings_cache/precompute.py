"""Precompute: the teacher sees every chosen image once; its embeddings go to shards."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from segment_anything.modeling import Sam

from embeddings_cache.embed import Encoder, Preparation, embedded_rows
from embeddings_cache.images import (
    Account,
    Decoder,
    Share,
    SkippedSamples,
    assign_sources,
    fingerprint,
    gather_notes,
    keep_key,
    look_through,
    pick_sources,
    read_with,
)
from embeddings_cache.shards import (
    CacheIdentity,
    CacheInfo,
    ShardWriter,
    check_space,
    images_name,
    is_complete,
    keys_in,
    read_info,
    refuse_other_cache,
    shard_paths,
)
from embeddings_cache.system import (
    TEMPORARY,
    Workers,
    available_cores,
    map_ahead,
    processes_here,
    progress_bar,
    sole_user,
    stop_on_request,
    write_json,
)
from embeddings_cache.teacher import TeacherEncoder, resolve_compile, weights_sha256
from students import InputError, StudentEncoder

MOST_WORKERS = 16
THREADS = 2
"""That read pictures where no processes do."""


def cache_identity(
    sam: Sam,
    teacher_name: str,
    *,
    teacher_dtype: str,
    dtype: str,
    jpeg_quality: int | str,
    images: str | list[str],
    fraction: float,
    annotations: str | None = None,
    sixteen_bit: str = "upper",
) -> CacheIdentity:
    """What a cache made with these settings is identified by."""
    encoder = sam.image_encoder
    cells = encoder.img_size // 16
    channels = encoder.embed_dim if isinstance(encoder, StudentEncoder) else encoder.neck[0].out_channels
    return CacheIdentity(
        teacher_name=teacher_name,
        teacher_sha256=weights_sha256(sam),
        teacher_dtype=teacher_dtype,
        image_size=encoder.img_size,
        embedding_shape=(channels, cells, cells),
        dtype=dtype,
        jpeg_quality=jpeg_quality,
        preprocess=fingerprint(sixteen_bit),
        data_images=images_name(images),
        data_fraction=fraction,
        data_annotations=annotations or "",
    )


def precompute(
    directory: Path,
    sam: Sam,
    identity: CacheIdentity,
    find_sources: Callable[[], list[str]],
    accelerator: Accelerator,
    *,
    batch_size: int | None = None,
    compiled: bool | str = False,
    images_per_shard: int = 256,
    max_skipped: float = 0.01,
    decoder: Decoder | None = None,
    workers: int | None = None,
) -> CacheInfo:
    """Make a cache, or what is missing of it; every process of the launch calls this.

    Args:
        directory: the cache; made if need be.
        sam: the teacher, in eval mode.
        identity: from `cache_identity`.
        find_sources: gives the tars and folders, of which `identity.data_fraction` is used; called only if something
            is missing, so that a finished cache needs no tar any more.
        batch_size: images a teacher pass; None: as many as fit.
        compiled: whether the teacher goes through `torch.compile`; "auto": see `resolve_compile`.
        images_per_shard: rows a shard, and so what a crash costs at most.
        max_skipped: share of bad samples above which the run stops.
        decoder: how pictures are read.
        workers: processes that read them, 0: none; None: `worker_count`.

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
    decoder = decoder or Decoder()

    with ExitStack() as held:
        held.enter_context(sole_user(directory, rank))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            leftovers = [f"{TEMPORARY}*"] if shard_paths(directory) else [f"{TEMPORARY}*", "notes*.jsonl"]
            for leftover in (path for pattern in leftovers for path in directory.glob(pattern)):
                leftover.unlink()
            write_json(directory / "cache.json", CacheInfo(identity, complete=False).as_json())
        accelerator.wait_for_everyone()

        picked, key_fraction = pick_sources(find_sources(), identity.data_fraction)
        done = {key for shard in shard_paths(directory) for key in keys_in(shard, identity)}
        total: int | None = None
        if accelerator.is_main_process:
            found = look_through(picked, lambda key: keep_key(key, key_fraction), decoder.annotations or ())
            total = found.total
            print(f"precompute: {found}")
            print(f"precompute: {check_space(directory, total and max(0, total - len(done)), identity)}")
        (total,) = broadcast_object_list([total])
        accelerator.wait_for_everyone()  # nobody adds a shard before all have listed them, and it will fit
        mine = None if total is None else max(0, total - len(done)) // ranks

        compiles = resolve_compile(compiled, accelerator.device, mine)
        encoder = TeacherEncoder(sam, accelerator.device, identity.teacher_dtype, compiles, batch_size)
        if compiles and compiled == "auto":
            accelerator.print("precompute: compiling the encoder ...")
            with stop_on_request() as request:
                line = encoder.compile_or_not()
                request.raise_if_made()
            if accelerator.is_main_process or not encoder.compiled:
                print(f"precompute: {line}")
        shares = assign_sources(picked, rank, ranks, resumed=bool(done))
        skipped = SkippedSamples(directory / "skipped.jsonl", max_skipped, good=len(done) // ranks, rank=rank)
        with progress_bar(
            accelerator, "precompute", "images", total=total and -(-total // ranks), initial=len(done) // ranks
        ) as progress:
            account = embed_shares(
                shares,
                lambda key: key not in done and keep_key(key, key_fraction),
                encoder,
                ShardWriter(directory, identity, rank, images_per_shard),
                skipped,
                progress.update,
                decoder,
                worker_count(accelerator.device) if workers is None else workers,
            )
            progress.total = progress.n
        accelerator.wait_for_everyone()
        skipped.samples = list(dict.fromkeys(gather_object(skipped.samples)))  # a divided tar is read by all
        refuse_differing(gather_object([account.divided]))
        left_out = {source: kinds for part in gather_object([account.left_out]) for source, kinds in part.items()}
        if accelerator.is_main_process:
            _finish(directory, identity, skipped, sum(left_out.values(), Counter()))
        accelerator.wait_for_everyone()
    finished = read_info(directory)
    assert finished is not None
    return finished


def embed_shares(
    shares: list[Share],
    wanted: Callable[[str], bool],
    encoder: Encoder,
    writer: ShardWriter,
    skipped: SkippedSamples,
    progress: Callable[[], object],
    decoder: Decoder,
    workers: int = 0,
) -> Account:
    """One process's share of the images → shards, reading, decoding, encoder and writing all at the same time.

    Args:
        wanted: whether the image with a key is to be embedded.
        skipped: is told of bad samples, and of the number of others.
        progress: called after each image.
        decoder: how pictures are read.
        workers: processes that decode and resize them; 0: threads of this one.

    Returns:
        What became of all that is no image.

    Raises:
        Stopped: a signal came.
    """
    account = Account(skipped, skipped.note)
    preparation = Preparation(decoder, encoder.image_size, writer.identity.jpeg_quality)
    with stop_on_request() as request, Workers(preparation, workers, THREADS) as hands:

        def still_wanted(key: str) -> bool:
            request.raise_if_made()  # also while what is there already is only passed over
            return wanted(key)

        with (
            closing(embedded_rows(encoder, read_with(hands, shares, still_wanted, account))) as rows,
            writer,  # ends its shard before the readers end, one of which may be waiting for a download
            closing(map_ahead(writer.write, rows, threads=1, ahead=4 * encoder.batch_size)) as written,
        ):
            for _ in written:
                skipped.good += 1
                progress()
                request.raise_if_made()
    return account


def refuse_differing(counts: list[dict[str, int]]) -> None:
    """Raise `InputError` where processes that divide a source have found different images in it."""
    for source in counts[0]:
        if len({found.get(source) for found in counts}) > 1:
            raise InputError(
                f"processes found different images in {source}: {[found.get(source) for found in counts]}. Has it "
                "changed, or can one of them not read it? The same command looks for what is missing"
            )


def worker_count(device: torch.device) -> int:
    """Processes that read pictures: for a GPU its share of the cores but one; none beside a teacher on the CPU, nor on
    a Mac, where each would import PyTorch first."""
    if device.type != "cuda":
        return 0
    return max(1, min(MOST_WORKERS, available_cores() // processes_here() - 1))


def _finish(directory: Path, identity: CacheIdentity, skipped: SkippedSamples, left_out: Counter[str]) -> None:
    """Write `skipped.jsonl` and `notes.jsonl`, judge the share of bad samples, and declare the cache complete."""
    shards = shard_paths(directory)
    rows = Counter(key for shard in shards for key in keys_in(shard, identity))
    skipped.samples += [(key, "key seen before") for key, count in rows.items() if count > 1]
    skipped.good = len(rows)
    skipped.write()
    if not rows:
        raise InputError(f"no image could be read from {identity.data_images!r}{skipped.commonest()}")
    skipped.refuse_too_many()
    noted = len({key for key, _ in gather_notes(directory)})
    info = CacheInfo(identity, True, len(rows), len(skipped.samples), len(shards), noted=noted, left_out=dict(left_out))
    write_json(directory / "cache.json", info.as_json())
