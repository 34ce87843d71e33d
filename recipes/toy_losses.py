"""How the toy learns: masks asked for by points and boxes, corrected by clicks, compared with the truth."""

from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from segment_anything.modeling import Sam

from distill.training.truth_loss import focal_and_dice

CLICKS = 2
BY_BOX = 0.6
"""Share of the pictures whose first prompts are boxes."""
CORRECTED = 0.25
"""Share of the pictures that get corrective clicks, on half as many masks."""

Example = tuple[torch.Tensor, torch.Tensor]
"""What the toy sees: encoder input float32 (3, S, S), and some masks, boolean (N, S, S), which may overlap."""


def backward(sam: Sam, batch: list[Example], rng: np.random.Generator, most: int, dtype: torch.dtype) -> float:
    """Leave the gradients of a batch in the parameters, and return its mean loss over masks; 0 where it has none.

    segment-anything's decoder takes one image at a time; gradients gather in the embeddings and go through the
    encoder once.

    Args:
        sam: the toy.
        batch: whose images have `most` masks at most.
        rng: draws what kind of prompts an image gets.
        most: masks that an image counts as, so that one with fewer weighs less.
        dtype: that the encoder computes in.
    """
    with torch.autocast(sam.device.type, dtype, enabled=dtype != torch.float32):
        embeddings = sam.image_encoder(torch.stack([pixels for pixels, _ in batch]).to(sam.device))
    leaves = embeddings.detach().float().requires_grad_()
    losses = []
    for number, (_, masks) in enumerate(batch):
        by_box, clicks = rng.random() < BY_BOX, CLICKS if rng.random() < CORRECTED else 0
        masks = masks[: most // 2] if clicks else masks
        if len(masks):
            loss = prompted_loss(sam, leaves[number : number + 1], masks.to(sam.device), by_box, clicks)
            (loss.sum() / (len(batch) * most)).backward()
            losses += loss.tolist()
    if leaves.grad is None:
        return 0.0
    embeddings.backward(leaves.grad.to(embeddings.dtype))
    return fmean(losses)


def prompted_loss(sam: Sam, embedding: torch.Tensor, masks: torch.Tensor, by_box: bool, clicks: int) -> torch.Tensor:
    """Losses of N masks (N, S, S) after a box or a point each, and again after each corrective click; flat."""
    count, size = len(masks), masks.shape[-1]
    covered = F.avg_pool2d(masks[:, None].float(), 4)
    points = torch.empty(count, 0, 2, device=masks.device)
    labels = torch.empty(count, 0, device=masks.device)
    boxes = noisy_boxes(masks) if by_box else None
    previous: torch.Tensor | None = None
    wrong, losses = masks, []
    for turn in range(1 + clicks):
        if turn or not by_box:
            clicked = random_points(torch.where(wrong.any((1, 2), keepdim=True), wrong, masks))
            inside = masks[torch.arange(count), clicked[:, 1], clicked[:, 0]].float()
            points = torch.cat([points, clicked[:, None]], 1)
            labels = torch.cat([labels, inside[:, None]], 1)
        sparse, dense = sam.prompt_encoder(
            points=(points, labels) if points.shape[1] else None, boxes=boxes, masks=previous
        )
        logits, predicted_iou = sam.mask_decoder.predict_masks(  # the single mask, and the three for a single point
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        losses.append(mask_loss(logits[:, :1], predicted_iou[:, :1], covered))
        if not turn:
            losses.append(mask_loss(logits[:, 1:], predicted_iou[:, 1:], covered))
        ambiguous = not turn and not by_box
        best = predicted_iou[:, 1:].argmax(1) + 1 if ambiguous else torch.zeros(count, dtype=torch.long)
        previous = logits[torch.arange(count), best][:, None].detach()
        wrong = (F.interpolate(previous, (size, size), mode="bilinear")[:, 0] > 0) ^ masks
    return torch.cat(losses)


def mask_loss(logits: torch.Tensor, predicted_iou: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
    """20 × focal + dice of the best of K masks, and the mean squared error of their predicted IoUs; (N,).

    Args:
        logits: (N, K, h, w).
        predicted_iou: (N, K).
        covered: share of each cell that lies in the mask, (N, 1, h, w).
    """
    covered = covered.expand_as(logits)
    with torch.no_grad():
        ours, truth = logits > 0, covered > 0.5
        iou = (ours & truth).sum((2, 3)) / (ours | truth).sum((2, 3)).clamp(min=1)
    return focal_and_dice(logits, covered).min(1).values + ((predicted_iou - iou) ** 2).mean(1)


def random_points(masks: torch.Tensor) -> torch.Tensor:
    """A uniformly drawn pixel of each mask (N, S, S), as (x, y), (N, 2); the prompt encoder adds the half pixel."""
    index = torch.multinomial(masks.flatten(1).float(), 1)[:, 0]
    return torch.stack([index % masks.shape[-1], index // masks.shape[-1]], 1)


def noisy_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Boxes (N, 4) of masks (N, S, S), each side moved by normal noise: 5 % of the box's side, 2 px at most."""
    extents = []
    for axis in (1, 2):
        hit = masks.any(axis).float()
        extents.append((hit.argmax(1), hit.shape[1] - hit.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = extents
    boxes = torch.stack([x0, y0, x1, y1], 1).float()
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return boxes + torch.randn_like(boxes) * (0.05 * sides).clamp(max=2)


def average_gradients(sam: Sam, accelerator: Accelerator) -> None:
    """Mean of the gradients over all processes; what no prompt of this process has touched counts as 0."""
    parameters = list(sam.parameters())
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    parts = accelerator.reduce(flat, reduction="mean").split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
