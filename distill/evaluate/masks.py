"""Masks: what the unchanged decoder makes of the student's embedding, of the teacher's, and how well each fits.

On every image one point and one box a mask: the point as SAM's own evaluation places the first click (the pixel
deepest inside the mask), the box as it encloses the mask. A point is ambiguous, so SAM's three masks are asked for
and the one with the highest predicted IoU is taken, as a user of `SamPredictor` would (arXiv:2304.02643, section 3);
for a box the single mask is. Images without annotations are prompted with a grid of points, and the student is then
compared with the teacher alone. `evaluate.clicks=5` adds what each comes to when it is corrected, click by click.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from segment_anything.modeling import Sam
from segment_anything.utils.amg import build_point_grid

from distill.evaluate.clicks import fits_of_clicks
from distill.evaluate.contestants import complete, digest_of, load_decoder
from distill.evaluate.decoding import PROMPTS_A_PASS, Seen, best_of
from distill.evaluate.ious import mask_areas, mask_ious
from distill.losses import embedding_errors
from distill.reading import reading_of
from distill.recipe import Recipe
from distill.run import chosen_student, is_current, open_cache, write_section
from distill.schema import EvaluateRecipe
from embeddings_cache.embed import Preparation, embedded_rows
from embeddings_cache.images import (
    Account,
    Decoder,
    assign_sources,
    bounding_box,
    center_point,
    decode_masks,
    expand_sources,
    pad_pixels,
    pick_sources,
    read_with,
    to_encoder_input,
)
from embeddings_cache.precompute import THREADS
from embeddings_cache.shards import CacheIdentity, CacheRow, read_info, refuse_other_cache
from embeddings_cache.system import (
    Workers,
    available_cores,
    map_ahead,
    processes_here,
    progress_bar,
    sha256,
)
from embeddings_cache.teacher import TeacherEncoder, weights_sha256
from students import InputError, first_line, load_student

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}
"""Area in pixels of the original image; COCO's ranges (pycocotools.cocoeval.Params)."""
MOST_THREADS = 4
"""That make prompts. Each holds the masks of an image at its own size, and as much again while it stacks them: of 64 in
a photograph of SA-1B's size 432 MB."""


@dataclass(frozen=True)
class Prompts:
    """N prompts of an image in pixels of the original: points (N, 2) as (x, y), boxes (N, 4) as (x0, y0, x1, y1).

    `masks` is what an annotator drew for each, boolean (N, H, W). Without annotations there are only points.
    """

    points: np.ndarray
    boxes: np.ndarray | None = None
    masks: np.ndarray | None = None


@dataclass(frozen=True)
class Score:
    """IoUs of one prompt; those with the ground truth, and its area in pixels, are None without annotations; that of
    student and teacher is None where each was corrected by clicks of its own."""

    key: str
    prompt: str
    area: int | None
    student_teacher: float | None
    student_truth: float | None
    teacher_truth: float | None


@dataclass(frozen=True)
class Compared:
    """An image: its embedding's error, MSE and cosine, and a score a prompt; or why it could not be prompted."""

    key: str
    error: tuple[float, float] = (math.nan, math.nan)
    scores: Sequence[Score] = ()
    trouble: str | None = None


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


def compare_rows(
    rows: Iterable[CacheRow], settings: EvaluateRecipe, teacher: Sam, student_sam: Sam
) -> Generator[Compared, None, None]:
    """What each image comes to, in order; prompts of those that follow are made meanwhile.

    Args:
        teacher: whose decoder makes the masks of both; rows have its embeddings.
        student_sam: from `load_sams`.
    """

    def prompted(row: CacheRow) -> tuple[CacheRow, Prompts | InputError]:
        try:
            return row, make_prompts(row, settings)
        except InputError as error:
            return row, error

    threads = prompt_threads(teacher.device)
    with closing(map_ahead(prompted, rows, threads, ahead=threads + 1)) as ready:
        for row, prompts in ready:
            if isinstance(prompts, InputError):
                yield Compared(row.key, trouble=str(prompts))
                continue
            embeddings = embed_both(row, student_sam)
            mse, cosine = embedding_errors(*embeddings)
            scores = [
                *score_image(row, teacher, *embeddings, prompts),
                *score_clicks(row, teacher, *embeddings, prompts, settings.clicks),
            ]
            yield Compared(row.key, (mse.item(), cosine.item()), scores)


def prompt_threads(device: torch.device) -> int:
    """Threads that make prompts of the images to come: beside a GPU one would be the slower part."""
    if device.type == "cpu":
        return 1
    return max(1, min(MOST_THREADS, available_cores() // processes_here() - 1))


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


@torch.no_grad()
def embed_both(row: CacheRow, student_sam: Sam) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's and the teacher's embedding of a row, float32 (1, C, h, w) each."""
    pixels = pad_pixels(row.pixels(), student_sam.image_encoder.img_size)[None].to(student_sam.device)
    student = student_sam.image_encoder(to_encoder_input(pixels, torch.tensor([row.input_size])))
    return student.float(), torch.from_numpy(row.embedding)[None].to(student.device).float()


def make_prompts(row: CacheRow, settings: EvaluateRecipe) -> Prompts:
    """Prompts from the row's annotation, or a grid of points.

    Raises:
        InputError: the annotation's masks cannot be decoded.
    """
    try:
        found = decode_masks(row.annotation) if row.annotation else ()
        masks = list(islice(found, settings.masks_per_image))
    except (ValueError, TypeError) as error:
        raise InputError(f"the annotation of {row.key} cannot be decoded: {first_line(error)}") from error
    if not masks:
        height, width = row.original_size
        return Prompts(build_point_grid(settings.grid) * (width, height))
    points = np.array([center_point(mask) for mask in masks])
    boxes = np.array([bounding_box(mask) for mask in masks])
    return Prompts(points, boxes, np.stack(masks))


def score_image(
    row: CacheRow, decoder: Sam, student: torch.Tensor, teacher: torch.Tensor, prompts: Prompts
) -> Iterator[Score]:
    """A score a prompt, each pair of masks decoded by the same decoder from the two embeddings."""
    for prompt, points, boxes in (("point", prompts.points, None), ("box", None, prompts.boxes)):
        if points is None and boxes is None:
            continue
        ours = predict_slices(decoder, student, row, points=points, boxes=boxes)
        theirs = predict_slices(decoder, teacher, row, points=points, boxes=boxes)
        done = 0
        for student_masks, teacher_masks in zip(ours, theirs, strict=True):
            agreement = mask_ious(student_masks, teacher_masks)
            if prompts.masks is None:
                yield from (Score(row.key, prompt, None, iou, None, None) for iou in agreement)
                continue
            truths = torch.from_numpy(prompts.masks[done : done + len(agreement)]).to(student_masks.device)
            done += len(agreement)
            measured = zip(
                mask_areas(truths),
                agreement,
                mask_ious(student_masks, truths),
                mask_ious(teacher_masks, truths),
                strict=True,
            )
            yield from (Score(row.key, prompt, *values) for values in measured)


def score_clicks(
    row: CacheRow, decoder: Sam, student: torch.Tensor, teacher: torch.Tensor, prompts: Prompts, clicks: int
) -> Iterator[Score]:
    """Scores after two clicks, three and so on, of annotated objects: student and teacher each get the clicks that
    correct them (`fits_of_clicks`)."""
    if prompts.masks is None:
        return
    for start in range(0, len(prompts.masks) if clicks > 1 else 0, PROMPTS_A_PASS):
        truths = prompts.masks[start : start + PROMPTS_A_PASS]
        areas = mask_areas(torch.from_numpy(truths))
        ours, theirs = (
            fits_of_clicks(Seen(decoder, embedding, row.original_size, row.input_size), truths, clicks)
            for embedding in (student, teacher)
        )
        for number, measured in enumerate(zip(ours, theirs, strict=True), start=1):
            if number > 1:  # of one there is a score already
                for area, own, other in zip(areas, *measured, strict=True):
                    yield Score(row.key, f"{number} clicks", area, None, own, other)


def predict_masks(
    sam: Sam,
    embedding: torch.Tensor,
    row: CacheRow,
    *,
    points: np.ndarray | None = None,
    boxes: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """`predict_slices` one by one, as arrays: boolean (H, W)."""
    for masks in predict_slices(sam, embedding, row, points=points, boxes=boxes):
        yield from masks.cpu().numpy()


@torch.no_grad()
def predict_slices(
    sam: Sam,
    embedding: torch.Tensor,
    row: CacheRow,
    *,
    points: np.ndarray | None = None,
    boxes: np.ndarray | None = None,
) -> Iterator[torch.Tensor]:
    """One mask a prompt, each prompt on its own; equal to `SamPredictor.predict` on the same embedding.

    Args:
        sam: whose prompt encoder and mask decoder are used.
        embedding: float32 (1, C, h, w).
        row: gives the image's sizes.
        points: foreground points (N, 2), or
        boxes: boxes (N, 4), in pixels of the original image.

    Yields:
        Boolean (n, H, W) at the original size, on the device; so many that their pixels stay below `PIXELS_AT_ONCE`.
    """
    seen = Seen(sam, embedding, row.original_size, row.input_size)
    asked = points[:, None] if points is not None else None
    for decoded in seen.decode(points=asked, boxes=boxes, multimask=points is not None):
        low_res, _ = best_of(*decoded)
        for logits in seen.enlarge(low_res):
            yield logits > sam.mask_threshold


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
