"""The held-out images that a report shows: where the student is best, middling and worst."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from distill.evaluate.compare import embed_both, make_prompts, predict_masks
from distill.evaluate.masks import evaluation_rows, load_sams
from distill.pictures import draw_prompts, overlay
from distill.recipe import Recipe
from students import InputError

SHOWN_MASKS = 8
SHOWN_SIDE = 480
"""Pixels that a panel's longest side has at most."""


@dataclass(frozen=True)
class Case:
    """One image: where it stands, its mean IoU of student's and teacher's masks, and pictures by title, RGB uint8."""

    rank: str
    key: str
    miou: float
    panels: dict[str, np.ndarray]


def draw_cases(recipe: Recipe, by_image: dict[str, float], device: torch.device) -> list[Case]:
    """Best, median and worst image, each with its prompts, ground truth, teacher's masks and student's masks.

    Args:
        recipe: whose evaluation is shown.
        by_image: mean IoU of student's and teacher's masks by key.
        device: where the two SAMs run.

    Raises:
        InputError: an image that was evaluated is gone.
    """
    ranked = sorted(by_image, key=lambda key: -by_image[key])
    ranks: dict[str, str] = {}
    for name, key in (("best", ranked[0]), ("worst", ranked[-1]), ("median", ranked[len(ranked) // 2])):
        ranks.setdefault(key, name)
    teacher, student_sam = load_sams(recipe, device)
    rows = {row.key: row for row in evaluation_rows(recipe, teacher, wanted=ranks.__contains__)}
    cases = []
    for key in sorted(ranks, key=lambda key: -by_image[key]):
        if (row := rows.get(key)) is None:
            raise InputError(f"{key} is not among the images any more: remove evaluation.json and evaluate again")
        student, original = embed_both(row, student_sam)
        prompts = make_prompts(row, recipe.evaluate)
        boxes = prompts.boxes[:SHOWN_MASKS] if prompts.boxes is not None else None
        spread = np.linspace(0, len(prompts.points) - 1, min(SHOWN_MASKS, len(prompts.points))).astype(int)
        points = prompts.points[spread]
        asked = {"points": points} if boxes is None else {"boxes": boxes}
        height, width = row.original_size
        image = np.asarray(Image.fromarray(row.pixels()).resize((width, height)))
        panels = {f"prompted by {'box' if boxes is not None else 'point'}": draw_prompts(image, **asked)}
        if prompts.masks is not None:
            panels["ground truth"] = overlay(image, prompts.masks[:SHOWN_MASKS])
        panels["teacher"] = overlay(image, list(predict_masks(teacher, original, row, **asked)))
        panels["student"] = overlay(image, list(predict_masks(teacher, student, row, **asked)))
        small = {title: shrink(picture) for title, picture in panels.items()}
        cases.append(Case(ranks[key], key, by_image[key], small))
    return cases


def shrink(picture: np.ndarray) -> np.ndarray:
    """A picture that is no larger than a report shows it."""
    image = Image.fromarray(picture)
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return np.asarray(image)
