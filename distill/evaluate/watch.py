"""Mask fidelity while a student trains."""

from contextlib import suppress
from dataclasses import replace
from statistics import fmean

from accelerate import Accelerator
from accelerate.utils import gather_object
from segment_anything.modeling import Sam
from torch import nn

from distill.evaluate.masks import Prompts, Score, embed_both, make_prompts, refuse_other_teacher, score_image
from distill.recipe import Recipe
from embeddings_cache.codec import CacheRow
from embeddings_cache.reader import EmbeddingsCache
from embeddings_cache.teacher import load_teacher
from students import InputError, build_student_sam, require_decoder

WATCHED_MASKS, WATCHED_GRID = 8, 3
"""Prompts of each kind an image; side of the grid where there is no annotation."""


class MaskWatch:
    """How well the student's masks match the teacher's on a few held-out images, while it trains.

    The embedding's error alone misleads about masks. Unless every process has the teacher's weights at hand there is
    no decoder, and nothing is watched.
    """

    def __init__(self, recipe: Recipe, cache: EmbeddingsCache, held_out: list[int], accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.decoder: Sam | None = None
        self.watched: list[tuple[CacheRow, Prompts]] = []
        if not recipe.train.watch_images:
            return
        teacher, missing = None, ""
        try:
            teacher = load_teacher(recipe.teacher.name, recipe.teacher.checkpoint, recipe.image_size)
            require_decoder(teacher)
        except InputError as error:
            missing = str(error)
        if any(reasons := gather_object([missing])):
            accelerator.print(f"train: masks are not watched: {next(filter(None, reasons))}")
            return
        assert teacher is not None
        refuse_other_teacher(recipe, cache.info.identity, teacher)
        del teacher.image_encoder  # most of its memory; the cache has what it said
        self.decoder = teacher.to(accelerator.device)
        settings = replace(
            recipe.evaluate,
            masks_per_image=min(WATCHED_MASKS, recipe.evaluate.masks_per_image),
            grid=min(WATCHED_GRID, recipe.evaluate.grid),
        )
        mine = held_out[: recipe.train.watch_images][accelerator.process_index :: accelerator.num_processes]
        for row in (cache[index] for index in mine):
            with suppress(InputError):  # an annotation that cannot be decoded; evaluate records it
                self.watched.append((row, replace(make_prompts(row, settings), masks=None)))

    def __call__(self, student: nn.Module) -> dict[str, float]:
        """Mean IoU of student's and teacher's masks by prompt, `val_miou_point` and `val_miou_box`."""
        if self.decoder is None:
            return {}
        student_sam = build_student_sam(self.accelerator.unwrap_model(student), self.decoder)
        scores: list[Score] = []
        for row, prompts in self.watched:
            scores += score_image(row, student_sam, *embed_both(row, student_sam), prompts)
        by_prompt: dict[str, list[float]] = {}
        for score in gather_object(scores):
            by_prompt.setdefault(score.prompt, []).append(score.student_teacher)
        return {f"val_miou_{prompt}": fmean(ious) for prompt, ious in by_prompt.items()}
