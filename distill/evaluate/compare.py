"""What a student's and a teacher's embedding of an image come to: masks by the same decoder, prompt by prompt.

On every image one point and one box a mask: the point as SAM's own evaluation places the first click (the pixel
deepest inside the mask), the box as it encloses the mask. A point is ambiguous, so SAM's three masks are asked for
and the one with the highest predicted IoU is taken, as a user of `SamPredictor` would (arXiv:2304.02643, section 3);
for a box the single mask is. Images without annotations are prompted with a grid of points, and the student is then
compared with the teacher alone. `evaluate.clicks=5` adds what each comes to when it is corrected, click by click.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.amg import build_point_grid

from distill.evaluate.clicks import fits_of_clicks
from distill.evaluate.decoding import PROMPTS_A_PASS, Seen, best_of
from distill.evaluate.ious import mask_areas, mask_ious
from distill.losses import embedding_errors
from distill.schema import EvaluateRecipe
from embeddings_cache.images import bounding_box, center_point, decode_masks, pad_pixels, to_encoder_input
from embeddings_cache.shards import CacheRow
from embeddings_cache.system import available_cores, map_ahead, processes_here
from students import InputError, first_line

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
