"""Learning from annotations: the student's masks, made by the teacher's frozen decoder, are to be the annotator's.

The end of EfficientViT-SAM's training (arXiv:2402.05008, section 3.2), which takes it past its teacher; but with the
decoder left as it is, so that the student goes on fitting SAM's.
"""

import torch
from torch.nn import functional as F

from distill.training.prompted import Corrections, PromptedDecoder, best_masks, masks_asked, pixels_inside
from distill.training.prompts import MaskPrompts

FOCAL, DICE = 20.0, 1.0
"""Weights of the two, as SAM is trained (arXiv:2304.02643, appendix A)."""

ALPHA, GAMMA = 0.25, 2.0
"""Of the focal loss, as its authors recommend (arXiv:1708.02002, section 5.1); SAM's paper names none."""


def truth_loss(
    decoder: PromptedDecoder, student: torch.Tensor, input_size: torch.Tensor, prompts: MaskPrompts
) -> torch.Tensor:
    """Focal and dice loss between the student's masks and those that were annotated.

    A mean over images, prompts and rounds, as of `mask_loss`; an image without masks counts as one that is learnt, with
    0. Of a single point's three masks only the one with the lowest loss learns (arXiv:2304.02643, section 3).

    Args:
        decoder: makes the masks.
        student: embeddings, float32 (B, C, h, w).
        input_size: int (B, 2), height and width of each image within the encoder's input.
        prompts: with `truths`; `draws` says how many rounds of corrections.

    Returns:
        A scalar.
    """
    clicked, rounds = prompts.points.shape[1], prompts.draws.shape[2]
    covered = (prompts.truths.float() / 255)[:, :, None]
    in_mask, outside = clear_cells(covered[:, :, 0])
    added = Corrections.none_yet(prompts)
    losses = []
    for number in range(rounds + 1):
        ours, predicted_iou = decoder.masks(student, decoder.tokens(prompts, added))
        inside = pixels_inside(input_size.to(ours.device), decoder.image_size, ours.shape[-1])[:, None]
        asked = masks_asked(clicked if number == 0 else 0, *ours.shape[1:3]).to(ours.device)
        distances = focal_and_dice(ours, covered, inside[:, None]).masked_fill(asked == 0, torch.inf)
        losses.append(distances.amin(dim=2).mean(dim=1))
        if number < rounds:
            best = best_masks(ours, predicted_iou, asked)
            right = in_mask | (best & ~outside)  # cells in between are right either way
            added = decoder.correct(added, best, right, inside, prompts.draws[:, :, number])
    return (torch.stack(losses).mean(dim=0) * prompts.labelled).mean()


def clear_cells(covered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which cells a click may call the mask's, and which background.

    The mask's are those of which it covers more than half as much as of the cell that it covers most: half a cell, or
    less where it is thinner than one. Background is what it does not touch.

    Args:
        covered: (..., h, w), the share of each cell that lies in the mask.

    Returns:
        Two booleans (..., h, w).
    """
    return covered > covered.amax(dim=(-2, -1), keepdim=True) / 2, covered == 0


def focal_and_dice(logits: torch.Tensor, covered: torch.Tensor, inside: torch.Tensor | None = None) -> torch.Tensor:
    """20 × focal loss (arXiv:1708.02002, equation 5), averaged over pixels, + dice loss, 1 − (2 Σpq + 1)/(Σp + Σq + 1).

    Args:
        logits: float32 (..., h, w).
        covered: broadcastable to them: q, the share of each cell that lies in the mask. Where it is neither 0 nor 1,
            what is right is p q + (1 − p)(1 − q), and alpha lies between those of both classes.
        inside: boolean, broadcastable to them; other pixels do not count. None: all do.

    Returns:
        (...)
    """
    counted = torch.ones_like(logits) if inside is None else inside.to(logits.dtype).expand_as(logits)
    covered = covered.expand_as(logits)
    p = logits.sigmoid()
    right = p * covered + (1 - p) * (1 - covered)
    alpha = ALPHA * covered + (1 - ALPHA) * (1 - covered)
    entropy = F.binary_cross_entropy_with_logits(logits, covered, reduction="none")
    focal = (alpha * (1 - right) ** GAMMA * entropy * counted).sum(dim=(-2, -1)) / counted.sum(dim=(-2, -1))
    overlap = (p * covered * counted).sum(dim=(-2, -1))
    dice = 1 - (2 * overlap + 1) / (((p + covered) * counted).sum(dim=(-2, -1)) + 1)
    return FOCAL * focal + DICE * dice
