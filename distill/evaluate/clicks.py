"""Clicks that correct a mask, one after another, as SAM's evaluation places them (arXiv:2304.02643, appendix D.1).

The first is the pixel deepest inside the object, each that follows the one deepest inside of what is wrong, on the
object or beside it; the decoder sees all of them and its last logits. After one click the mask is, of three, the one
with the highest predicted IoU; then the single one.
"""

from collections.abc import Iterator

import numpy as np
import torch

from distill.evaluate.decoding import Seen, best_of
from distill.evaluate.ious import mask_ious
from embeddings_cache.images import center_point

MOST_CLICKS = 5


@torch.no_grad()
def fits_of_boxes(seen: Seen, truths: np.ndarray, boxes: np.ndarray) -> list[float]:
    """IoUs with N objects, boolean (N, H, W), of the masks of boxes around them, (N, 4): (x0, y0, x1, y1) in pixels."""
    low_res = torch.cat([logits[:, 0] for logits, _ in seen.decode(boxes=boxes)])
    return mask_ious(_enlarged(seen, low_res), torch.from_numpy(truths))


@torch.no_grad()
def fits_of_clicks(seen: Seen, truths: np.ndarray, clicks: int) -> Iterator[list[float]]:
    """IoUs with N objects, boolean (N, H, W), none of them empty, after one click on each, after two, and so on."""
    points = np.array([[center_point(truth)] for truth in truths])
    labels = np.ones(points.shape[:2])
    earlier: torch.Tensor | None = None
    for number in range(1, clicks + 1):
        passes = seen.decode(points=points, labels=labels, masks=earlier, multimask=number == 1)
        earlier = torch.cat([best_of(*found)[0] for found in passes])
        masks = _enlarged(seen, earlier)
        yield mask_ious(masks, torch.from_numpy(truths))
        if number < clicks:
            added = [next_click(mask, truth) for mask, truth in zip(masks.numpy(), truths, strict=True)]
            points = np.concatenate([points, np.array([[(x, y)] for x, y, _ in added])], axis=1)
            labels = np.concatenate([labels, np.array([[label] for *_, label in added])], axis=1)


def next_click(mask: np.ndarray, truth: np.ndarray) -> tuple[float, float, int]:
    """(x, y, label) of the pixel deepest inside of where a boolean mask (H, W) is wrong; label −1 is no click, where it
    is not."""
    wrong = mask ^ truth
    if not wrong.any():
        return 0.0, 0.0, -1
    x, y = center_point(wrong)
    return x, y, int(truth[int(y), int(x)])


def _enlarged(seen: Seen, low_res: torch.Tensor) -> torch.Tensor:
    """Low-resolution logits → boolean masks (N, H, W) on the CPU."""
    return torch.cat([(logits > seen.sam.mask_threshold).cpu() for logits in seen.enlarge(low_res)])
