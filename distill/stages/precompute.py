"""Precompute: the embeddings cache, with a recipe's settings."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path

from accelerate import Accelerator

from distill.needs import need_images, need_own_cache, need_teacher
from distill.reading import annotations_of, reading_of
from distill.recipe import Recipe
from embeddings_cache.images import (
    Decoder,
    commonest,
    expand_sources,
    listed,
    read_notes,
    scene_count,
    write_scene_tars,
)
from embeddings_cache.precompute import cache_identity, precompute
from embeddings_cache.shards import is_complete, read_info
from embeddings_cache.system import progress_bar
from embeddings_cache.teacher import load_teacher, resolve_dtype
from students import InputError, left_out


def check(recipe: Recipe, before: Collection[str]) -> None:
    """A teacher, and images unless the cache is finished; a finished one was made with these settings."""
    need_teacher(recipe)
    if recipe.cache.per_node:
        raise InputError(
            "cache.per_node=true takes shards that are there: stage=train, and others with a whole cache.dir"
        )
    info = need_own_cache(recipe)
    if not scene_count(recipe.data.images) and (info is None or not info.complete):
        need_images(recipe.data.images, recipe.data.fraction)
        annotations_of(recipe)


def run(recipe: Recipe, accelerator: Accelerator) -> bool:
    """`embeddings_cache.precompute`; returns False where the cache was there."""
    directory = Path(recipe.cache.dir)
    sam = load_teacher(recipe.teacher.name, recipe.teacher.checkpoint, recipe.image_size)
    if line := left_out(sam):
        accelerator.print(f"precompute: {line}")
    earlier = read_info(directory)
    # A cache goes on as it was begun, whatever the device at hand would choose.
    begun = earlier.identity.teacher_dtype if earlier and recipe.teacher.dtype == "auto" else recipe.teacher.dtype
    identity = cache_identity(
        sam,
        recipe.teacher.name,
        teacher_dtype=resolve_dtype(begun, accelerator.device),
        dtype=recipe.cache.dtype,
        jpeg_quality=recipe.cache.jpeg_quality,
        images=recipe.data.images,
        fraction=recipe.data.fraction,
        annotations=recipe.data.annotations,
        sixteen_bit=recipe.data.sixteen_bit,
    )
    complete = earlier is not None and is_complete(directory, earlier)
    annotations = None if complete else annotations_of(recipe)
    info = precompute(
        directory,
        sam,
        identity,
        lambda: image_sources(recipe, accelerator),
        accelerator,
        batch_size=recipe.teacher.batch_size,
        compiled=recipe.teacher.compile,
        images_per_shard=recipe.cache.images_per_shard,
        max_skipped=recipe.data.max_skipped,
        decoder=Decoder(reading_of(recipe), annotations),
        workers=recipe.data.workers,
    )
    skipped = f", {info.skipped} bad samples skipped (skipped.jsonl)" if info.skipped else ""
    if info.noted and (notes := directory / "notes.jsonl").exists():
        why = commonest(list(read_notes(notes)))
        accelerator.print(f"precompute: of some images there is something to know, most often {why}")
    noted = f", notes on {info.noted} of them (notes.jsonl)" if info.noted else ""
    apart = f", {listed(Counter(info.left_out))} left out" if info.left_out else ""
    accelerator.print(f"precompute: {info.images} images in {directory}{noted}{skipped}{apart}")
    return not complete


def image_sources(recipe: Recipe, accelerator: Accelerator) -> list[str]:
    """The tars and folders of `data.images`; scenes are generated first."""
    count = scene_count(recipe.data.images)
    if not count:
        return expand_sources(recipe.data.images)
    directory, longest_side = Path(recipe.cache.dir) / "scenes", recipe.image_size * 5 // 4
    with accelerator.main_process_first(), progress_bar(accelerator, "scenes", "scenes", total=count) as progress:
        return write_scene_tars(directory, count, longest_side, done=progress.update)
