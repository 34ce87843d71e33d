"""The stages that make and check the embeddings cache, with a recipe's settings."""

from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from distill.recipe import Recipe
from embeddings_cache.encoder import TeacherEncoder, resolve_dtype
from embeddings_cache.format import read_info
from embeddings_cache.precompute import cache_identity, precompute, refuse_other_cache
from embeddings_cache.progress import progress_bar
from embeddings_cache.reader import is_complete
from embeddings_cache.scenes import scene_count, write_scene_tars
from embeddings_cache.sources import expand_sources
from embeddings_cache.teacher import load_teacher, weights_sha256
from embeddings_cache.verify import verify_cache


def run_precompute(recipe: Recipe, accelerator: Accelerator) -> bool:
    """`embeddings_cache.precompute` with a recipe's settings; returns False where the cache was there."""
    directory = Path(recipe.cache.dir)
    sam = load_teacher(recipe.teacher.name, recipe.teacher.checkpoint, recipe.image_size)
    before = read_info(directory)
    # A cache goes on as it was begun, whatever the device at hand would choose.
    begun = before.identity.teacher_dtype if before and recipe.teacher.dtype == "auto" else recipe.teacher.dtype
    identity = cache_identity(
        sam,
        recipe.teacher.name,
        teacher_dtype=resolve_dtype(begun, accelerator.device),
        dtype=recipe.cache.dtype,
        jpeg_quality=recipe.cache.jpeg_quality,
        images=recipe.data.images,
        fraction=recipe.data.fraction,
    )
    complete = before is not None and is_complete(directory, before)
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
    )
    skipped = f", {info.skipped} bad samples skipped (skipped.jsonl)" if info.skipped else ""
    accelerator.print(f"precompute: {info.images} images in {directory}{skipped}")
    return not complete


def image_sources(recipe: Recipe, accelerator: Accelerator) -> list[str]:
    """The tars and folders of `data.images`; scenes are generated first."""
    count = scene_count(recipe.data.images)
    if not count:
        return expand_sources(recipe.data.images)
    directory, longest_side = Path(recipe.cache.dir) / "scenes", recipe.image_size * 5 // 4
    with accelerator.main_process_first(), progress_bar(accelerator, "scenes", "scenes", total=count) as progress:
        return write_scene_tars(directory, count, longest_side, done=progress.update)


def run_verify(recipe: Recipe, accelerator: Accelerator) -> bool:
    """`embeddings_cache.verify` on the main process, a printed verdict for each shard.

    Raises:
        InputError: there is no cache, or the teacher at hand is not the one that made it.
        DamagedCache: something is wrong with it.
    """
    if accelerator.is_main_process:
        directory, encoder = Path(recipe.cache.dir), None
        if recipe.verify.recompute and (info := read_info(directory)) is not None:
            sam = load_teacher(recipe.teacher.name, recipe.teacher.checkpoint, recipe.image_size)
            ours = replace(info.identity, teacher_name=recipe.teacher.name, teacher_sha256=weights_sha256(sam))
            refuse_other_cache(directory, info.identity, ours)
            encoder = TeacherEncoder(sam, accelerator.device, info.identity.teacher_dtype, batch_size=1)
        verify_cache(directory, encoder, recipe.verify.recompute, recipe.verify.drop)
    accelerator.wait_for_everyone()
    return True
