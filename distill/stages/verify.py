"""Verify: is the cache what it claims to be?"""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from distill.needs import need_teacher
from distill.recipe import Recipe
from embeddings_cache.embed import embed_again
from embeddings_cache.shards import read_info, refuse_other_cache, verify_cache
from embeddings_cache.teacher import TeacherEncoder, load_teacher, weights_sha256


def check(recipe: Recipe, before: Collection[str]) -> None:
    """A teacher, where rows are embedded again."""
    if recipe.verify.recompute:
        need_teacher(recipe)


def run(recipe: Recipe, accelerator: Accelerator) -> bool:
    """`verify_cache` on the main process, a printed verdict for each shard.

    Raises:
        InputError: there is no cache, or the teacher at hand is not the one that made it.
        DamagedCache: something is wrong with it.
    """
    if accelerator.is_main_process:
        directory, embed = Path(recipe.cache.dir), None
        if recipe.verify.recompute and (info := read_info(directory)) is not None:
            sam = load_teacher(recipe.teacher.name, recipe.teacher.checkpoint, recipe.image_size)
            ours = replace(info.identity, teacher_name=recipe.teacher.name, teacher_sha256=weights_sha256(sam))
            refuse_other_cache(directory, info.identity, ours)
            encoder = TeacherEncoder(sam, accelerator.device, info.identity.teacher_dtype, batch_size=1)
            embed = partial(embed_again, encoder)
        verify_cache(directory, embed, recipe.verify.recompute, recipe.verify.drop)
    accelerator.wait_for_everyone()
    return True
