"""Masks: what the unchanged decoder makes of the student's embedding, of the teacher's, and how well each fits, on the
cache's held-out images or on others. `compare.py` says of an image how."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from segment_anything.modeling import Sam

from distill.evaluate.compare import Score, compare_rows
from distill.evaluate.contestants import complete, digest_of, load_decoder
from distill.reading import reading_of
from distill.recipe import Recipe
from distill.run import chosen_student, is_current, open_cache, write_section
from embeddings_cache.embed import Preparation, embedded_rows
from embeddings_cache.images import Account, Decoder, assign_sources, expand_sources, pick_sources, read_with
from embeddings_cache.precompute import THREADS
from embeddings_cache.shards import CacheIdentity, CacheRow, read_info, refuse_other_cache
from embeddings_cache.system import Workers, progress_bar, sha256
from embeddings_cache.teacher import TeacherEncoder, weights_sha256
from students import InputError, load_student

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
"""Area in pixels of the original image; COCO's ranges (pycocotools.cocoeval.Params)."""


def evaluate_masks(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Write the section `masks` of `evaluation.json` for the chosen student; returns False where it was there.

    Raises:
        InputError: no student, no cache or no teacher of the recipe, or no image to evaluate on.
    """
    result = Path(recipe.run_dir) / "evaluation.json"
    inputs = evaluation_inputs(recipe)
    if is_current(result, inputs, accelerator, section="masks"):
        return False
    teacher, student_sam = load_sams(recipe, accelerator.device)
    scores: list[Score] = []
    errors: list[tuple[float, float]] = []
    skipped: list[dict[str, str]] = []
    noted: list[dict[str, str]] = []

    def skip(key: str, reason: str) -> None:
        skipped.append({"key": key, "reason": reason})

    def note(key: str, reason: str) -> None:
        noted.append({"key": key, "reason": reason})

    account = Account(skip, note)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    with (
        closing(evaluation_rows(recipe, teacher, account, rank, ranks)) as rows,
        closing(compare_rows(rows, recipe.evaluate, teacher, student_sam)) as compared,
        progress_bar(accelerator, "evaluate", "images") as progress,
    ):
        for found in compared:
            progress.update()
            if found.trouble is not None:
                skip(found.key, found.trouble)
                continue
            errors.append(found.error)
            scores += found.scores
    scores, errors = gather_object(scores), gather_object(errors)
    skipped, noted = gather_object(skipped), gather_object(noted)
    if not errors:
        raise InputError(f"evaluate: no image could be read{f', {skipped[0]}' if skipped else ''}")
    if accelerator.is_main_process:
        content = {"task": "masks", "student": student_sam.image_encoder.config.name, **summarize(scores, errors)}
        write_section(result, "masks", {**content, "skipped": skipped, "noted": noted, "made_from": inputs})
    accelerator.wait_for_everyone()
    return True


def evaluation_inputs(recipe: Recipe) -> dict[str, Any]:
    """What an evaluation depends on; stored in it, so that a later run can tell whether it is current."""
    settings = {key: getattr(recipe.evaluate, key) for key in ("data", "masks_per_image", "grid", "clicks")}
    inputs: dict[str, Any] = {"student_sha256": sha256(chosen_student(recipe)), "evaluate": settings}
    if recipe.evaluate.data is None:
        info = read_info(Path(recipe.cache.dir))
        return {**inputs, "val_images": recipe.data.val_images, "cache": info and info.identity.as_json()}
    digest = digest_of(recipe.teacher.checkpoint)
    teacher = {"name": recipe.teacher.name, "dtype": recipe.teacher.dtype, "file_sha256": digest}
    inputs |= {"sixteen_bit": recipe.data.sixteen_bit} if recipe.data.sixteen_bit != "upper" else {}
    return {**inputs, "teacher": teacher, "image_size": recipe.image_size, "jpeg_quality": recipe.cache.jpeg_quality}


def load_sams(recipe: Recipe, device: torch.device) -> tuple[Sam, Sam]:
    """The teacher, and a `Sam` of the chosen student around the teacher's decoder.

    Raises:
        InputError: one of them cannot be had, or they do not fit.
    """
    student = load_student(chosen_student(recipe))
    teacher = load_decoder(recipe, device)
    return teacher, complete(student, chosen_student(recipe), teacher)


def evaluation_rows(
    recipe: Recipe,
    teacher: Sam,
    account: Account | None = None,
    rank: int = 0,
    ranks: int = 1,
    wanted: Callable[[str], bool] = lambda key: True,
) -> Generator[CacheRow, None, None]:
    """This process's images with the teacher's embeddings: the cache's held-out ones, or those of `evaluate.data`.

    Raises:
        InputError: the cache is missing, or another teacher's.
    """
    if recipe.evaluate.data is not None:
        sources, _ = pick_sources(expand_sources(recipe.evaluate.data), 1.0)
        shares = assign_sources(sources, rank, ranks)
        encoder = TeacherEncoder(
            teacher, teacher.device, recipe.teacher.dtype, recipe.teacher.compile is True, recipe.teacher.batch_size
        )
        preparation = Preparation(Decoder(reading_of(recipe)), recipe.image_size, recipe.cache.jpeg_quality)
        with (
            Workers(preparation, threads=THREADS) as workers,
            closing(embedded_rows(encoder, read_with(workers, shares, wanted, account))) as rows,
        ):
            yield from rows
        return
    cache = open_cache(recipe)
    refuse_other_teacher(recipe, cache.info.identity, teacher)
    _, held_out = cache.split(recipe.data.val_images)
    yield from (cache[index] for index in held_out[rank::ranks] if wanted(cache.keys[index]))


def refuse_other_teacher(recipe: Recipe, identity: CacheIdentity, teacher: Sam) -> None:
    """Raise `InputError` unless the cache was made with these very weights."""
    refuse_other_cache(Path(recipe.cache.dir), identity, replace(identity, teacher_sha256=weights_sha256(teacher)))


def summarize(scores: list[Score], errors: list[tuple[float, float]]) -> dict[str, Any]:
    """Means over masks by prompt and size, means over images of the embedding's errors, and a score an image."""
    by_image: dict[str, list[float]] = {}
    for score in scores:
        if score.student_teacher is not None:
            by_image.setdefault(score.key, []).append(score.student_teacher)
    return {
        "images": len(errors),
        "embedding": {"mse": fmean(mse for mse, _ in errors), "cosine": fmean(cosine for _, cosine in errors)},
        "miou": {
            prompt: _by_size([score for score in scores if score.prompt == prompt])
            for prompt in dict.fromkeys(score.prompt for score in scores)
        },
        "student_teacher_miou_by_image": {key: fmean(values) for key, values in sorted(by_image.items())},
    }


def _by_size(scores: list[Score]) -> dict[str, Any]:
    sized = [score for score in scores if score.area is not None]
    groups = {name: [s for s in sized if low <= (s.area or 0) < high] for name, (low, high) in SIZES.items()}
    return {name: _means(group) for name, group in {"all": scores, **groups}.items() if group}


def _means(scores: list[Score]) -> dict[str, float]:
    means: dict[str, float] = {"masks": len(scores)}
    for comparison in ("student_teacher", "student_truth", "teacher_truth"):
        values = [value for score in scores if (value := asdict(score)[comparison]) is not None]
        if values:
            means[comparison] = fmean(values)
    return means
