"""Decoder-aware distillation: one decoder makes masks of both embeddings, and the student's are to be the teacher's.

EdgeSAM's prompt-in-the-loop distillation (arXiv:2312.06660, section 3.3) at a lower price: the teacher's embedding
comes from the cache, so that its encoder never runs again. Prompt encoder and mask decoder are frozen; the gradient
goes through the decoder into the student's embedding.
"""

import torch
from torch.nn import functional as F

from distill.training.prompted import Corrections, PromptedDecoder, best_masks, masks_asked, pixels_inside
from distill.training.prompts import MaskPrompts

EPSILON = 1e-3
"""Of a pixel: makes the dice of two masks that are surely empty 1."""


def mask_loss(
    decoder: PromptedDecoder,
    student: torch.Tensor,
    teacher: torch.Tensor,
    input_size: torch.Tensor,
    prompts: MaskPrompts,
    targets: str = "soft",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary cross entropy and dice between the student's masks and the teacher's.

    Means over images, prompts and rounds: first the prompts alone, then with a corrective point more each round.

    Args:
        decoder: makes masks of both.
        student, teacher: embeddings, float32 (B, C, h, w).
        input_size: int (B, 2), height and width of each image within the encoder's input.
        prompts: as many for each image; `draws` says how many rounds of corrections.
        targets: `soft`, the teacher's probabilities, or `binary`, its masks.

    Returns:
        Cross entropy and dice, scalars; both 0 where soft masks agree in every pixel's probability, and where the
        student is sure of the teacher's binary ones.
    """
    clicked, rounds = prompts.points.shape[1], prompts.draws.shape[2]
    added = Corrections.none_yet(prompts)
    losses = []
    for number in range(rounds + 1):
        tokens = decoder.tokens(prompts, added)
        ours, _ = decoder.masks(student, tokens)
        with torch.no_grad():
            theirs, predicted_iou = decoder.masks(teacher, tokens)
        inside = pixels_inside(input_size.to(theirs.device), decoder.image_size, theirs.shape[-1])[:, None]
        asked = masks_asked(clicked if number == 0 else 0, *theirs.shape[1:3]).to(theirs.device)
        distances = torch.stack(mask_distances(ours, theirs, inside[:, None], targets))
        losses.append((distances * asked).sum(dim=3).mean(dim=(1, 2)))
        if number < rounds:
            student_best, teacher_best = (best_masks(each, predicted_iou, asked) for each in (ours, theirs))
            added = decoder.correct(added, student_best, teacher_best, inside, prompts.draws[:, :, number])
    cross_entropy, dice = torch.stack(losses).mean(dim=0)
    return cross_entropy, dice


def mask_distances(
    student: torch.Tensor, teacher: torch.Tensor, inside: torch.Tensor, targets: str = "soft"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy and dice loss of masks, neither below 0 anywhere.

    Soft targets q are the teacher's probabilities. Of the cross entropy their own entropy is subtracted, which has no
    gradient. Dice is 1 − 2 Σpq / (Σp² + Σq²) (V-Net, arXiv:1606.04797, section 3): with squares, unlike with plain
    sums, it is least where p = q, and both are 0 there. Binary ones are 1 where the teacher's logit is above 0: plain
    cross entropy, and dice as EdgeSAM has it, 1 − (2 Σpq + 1) / (Σp + Σq + 1).

    Args:
        student, teacher: logits, float32 (..., H, W).
        inside: boolean, broadcastable to them; other pixels do not count.
        targets: soft or binary.

    Returns:
        (...) both; the cross entropy is a mean over the pixels that count.
    """
    counted = inside.to(student.dtype).expand_as(student)
    p = student.sigmoid()
    q = teacher.sigmoid() if targets == "soft" else (teacher > 0).to(student.dtype)
    entropy = F.binary_cross_entropy_with_logits(student, q, reduction="none")
    if targets == "soft":
        entropy = entropy - F.binary_cross_entropy_with_logits(teacher, q, reduction="none")
    overlap = (p * q * counted).sum(dim=(-2, -1))
    sums, slack = ((p.square() + q.square()), EPSILON) if targets == "soft" else (p + q, 1.0)
    dice = 1 - (2 * overlap + slack) / ((sums * counted).sum(dim=(-2, -1)) + slack)
    return (entropy * counted).sum(dim=(-2, -1)) / counted.sum(dim=(-2, -1)), dice
