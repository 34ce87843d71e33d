"""Mask fidelity while a student trains."""

from contextlib import suppress
from dataclasses import replace
from statistics import fmean

from accelerate import Accelerator
from accelerate.utils import gather_object
from segment_anything.modeling import Sam
from torch import nn

from distill.evaluate.compare import Prompts, Score, embed_both, make_prompts, score_image
from distill.evaluate.masks import refuse_other_teacher
from distill.recipe import Recipe
from distill.training.plan import wants_masks
from embeddings_cache.shards import CacheRow, EmbeddingsCache
from embeddings_cache.teacher import load_teacher
from students import InputError, build_student_sam, require_decoder

WATCHED_MASKS, WATCHED_GRID = 8, 3
"""Prompts of each kind an image; side of the grid where there is no annotation."""


def load_decoder(recipe: Recipe, cache: EmbeddingsCache, accelerator: Accelerator) -> Sam | None:
    """The teacher without its image encoder, on the device; None where masks are neither watched nor learnt from.

    Without the teacher's weights on every process masks are not watched, and the main process says so.

    Raises:
        InputError: the cache is another teacher's, or masks are to be learnt from and the weights are missing.
    """
    if not recipe.train.watch_images and not wants_masks(recipe):
        return None
    teacher, missing = None, ""
    try:
        teacher = load_teacher(recipe.teacher.name, recipe.teacher.checkpoint, recipe.image_size)
        require_decoder(teacher)
    except InputError as error:
        missing = str(error)
    if reasons := [reason for reason in gather_object([missing]) if reason]:
        if wants_masks(recipe):
            raise InputError(f"losses of masks take the teacher's decoder: {reasons[0]}")
        accelerator.print(f"train: masks are not watched: {reasons[0]}")
        return None
    assert teacher is not None
    refuse_other_teacher(recipe, cache.info.identity, teacher)
    del teacher.image_encoder  # most of its memory; the cache has what it said
    return teacher.to(accelerator.device)


class MaskWatch:
    """How well the student's masks match the teacher's on a few held-out images, while it trains.

    The embedding's error alone misleads about masks.

    Args:
        rows: of the cache that this process watches.
        decoder: from `load_decoder`; without one nothing is watched.
    """

    def __init__(
        self, recipe: Recipe, cache: EmbeddingsCache, rows: list[int], decoder: Sam | None, accelerator: Accelerator
    ) -> None:
        self.accelerator, self.decoder = accelerator, decoder
        self.watched: list[tuple[CacheRow, Prompts]] = []
        settings = replace(
            recipe.evaluate,
            masks_per_image=min(WATCHED_MASKS, recipe.evaluate.masks_per_image),
            grid=min(WATCHED_GRID, recipe.evaluate.grid),
        )
        for row in (cache[index] for index in (rows if decoder is not None else ())):
            with suppress(InputError):  # an annotation that cannot be decoded; evaluate records it
                self.watched.append((row, replace(make_prompts(row, settings), masks=None)))

    def __call__(self, student: nn.Module) -> dict[str, float]:
        """Mean IoU of student's and teacher's masks by prompt, `val_miou_point` and `val_miou_box`, and the mean of
        these, `val_miou`; nothing where nothing is watched."""
        if self.decoder is None:
            return {}
        student_sam = build_student_sam(student, self.decoder)
        scores: list[Score] = []
        for row, prompts in self.watched:
            scores += score_image(row, student_sam, *embed_both(row, student_sam), prompts)
        by_prompt: dict[str, list[float]] = {}
        for score in gather_object(scores):
            by_prompt.setdefault(score.prompt, []).append(score.student_teacher)
        means = {f"val_miou_{prompt}": fmean(ious) for prompt, ious in by_prompt.items()}
        return {**means, "val_miou": fmean(means.values())} if means else {}
