"""Edges: boundaries that nobody has trained for, on BSDS500 (arXiv:2304.02643, section 4.2 and appendix D.2).

A grid of 16×16 foreground points, three masks each. Doubles are removed by NMS over their boxes, as
`SamAutomaticMaskGenerator` does it, at 0.7; no mask is left out for its predicted IoU or its stability, and there are
no crops (segment-anything, issue 226). Of each mask that is left, the Sobel magnitude of its probability (the sigmoid
of its logits) where it meets the mask's outer boundary, the pixels that touch the mask and are not of it. Their
maximum, brought to [0, 1], after edge NMS, is the edge map. It is kept as a PNG, and compared as it is there.

The paper says no more: how the mask's boundary and the NMS of edges are meant is the reading of the one public attempt
(github.com/ymgw55/segment-anything-edge-detection), whose best with ViT-H is .746 / .776 / .769 / .925, not the .768 /
.786 / .794 / .928 of the paper. Nobody outside Meta has reproduced these: compare ratios to the teacher.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.io import loadmat
from segment_anything.utils.amg import batched_mask_to_box, build_point_grid
from torchvision.ops import nms

from distill.evaluate.boundaries import Counts, count_boundaries, summarize_counts, suppress_non_maxima, thresholds_of
from distill.evaluate.decoding import Paired, Seen, Segmenter, pair, read_photograph, write_map
from distill.reading import reading_of
from distill.recipe import Recipe
from students import InputError

COLUMNS = ("ODS", "OIS", "AP", "R50")
UNIT = "images"

GRID, BOX_NMS = 16, 0.7
LAYOUTS = ("", "data", "BSDS500/data", "BSR/BSDS500/data")
"""Where within `evaluate.data` BSDS500's `images/` and `groundTruth/` may lie."""
PICTURES = (".jpg", ".jpeg", ".png")


def settings(recipe: Recipe) -> dict[str, Any]:
    """Edge maps depend on nothing that a recipe says, what is counted in them on the thresholds."""
    return {"thresholds": recipe.evaluate.thresholds}


def find(recipe: Recipe) -> list[Paired]:
    """The test images of BSDS500, by name; where there is no `test` folder, those of `images/` and `groundTruth/`.

    Raises:
        InputError: no such folders, no image, or one without its `.mat`.
    """
    root = Path(recipe.evaluate.data)
    for layout in LAYOUTS:
        for split in ("test", ""):
            images, truths = root / layout / "images" / split, root / layout / "groundTruth" / split
            found = sorted(path for path in images.glob("*") if path.suffix.lower() in PICTURES)
            if truths.is_dir() and found:
                return pair(found, truths, ".mat")
    raise InputError(
        f"evaluate.data={root} is not laid out as BSDS500: images/test/*.jpg and groundTruth/test/*.mat, within it or "
        "within BSDS500/data/"
    )


def measure(item: Paired, segmenter: Segmenter, recipe: Recipe, pictures: Path) -> dict[str, Any]:
    """Pixels at each threshold, see `Counts`; the edge map goes to `pictures`."""
    image, truths = read_photograph(item.image, reading_of(recipe)), read_boundaries(item.truth)
    if {truth.shape for truth in truths} != {image.shape[:2]}:
        raise InputError(f"{item.truth.name} is not of an image of {image.shape[1]}×{image.shape[0]} px")
    levels = write_map(pictures / f"{item.key}.png", edge_map(segmenter.look(image)))
    counts = count_boundaries(levels / 255, truths, thresholds_of(recipe.evaluate.thresholds))
    return {name: values.tolist() for name, values in vars(counts).items()}


def summarize(results: Mapping[str, dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """ODS, OIS, AP and R50, and precision and recall at each threshold."""
    images = [Counts(**{name: np.array(values) for name, values in each.items()}) for each in results.values()]
    return summarize_counts(images, thresholds_of(recipe.evaluate.thresholds))


def read_boundaries(path: Path) -> list[np.ndarray]:
    """Boundaries of a `.mat` of BSDS500, boolean (H, W), one a person.

    Raises:
        InputError: the file is damaged, or another one.
    """
    try:
        people = loadmat(path)["groundTruth"].ravel()
        return [np.asarray(person["Boundaries"][0, 0]) > 0 for person in people]
    except Exception as error:  # of many kinds, from a reader of a binary format
        raise InputError(f"{path} has no boundaries as BSDS500 has them: {error!r}") from error


@torch.no_grad()
def edge_map(seen: Seen) -> np.ndarray:
    """The zero-shot edge map of a photograph: float64 (H, W) in [0, 1], thin lines."""
    height, width = seen.original_size
    points = build_point_grid(GRID) * (width, height)
    decoded = list(seen.decode(points=points[:, None], multimask=True))
    low_res = torch.cat([logits for logits, _ in decoded]).flatten(0, 1)
    predicted_iou = torch.cat([ious for _, ious in decoded]).flatten()
    threshold = seen.sam.mask_threshold
    boxes = torch.cat([batched_mask_to_box(logits > threshold) for logits in seen.enlarge(low_res)])
    solid = torch.nonzero((boxes[:, 2:] > boxes[:, :2]).all(dim=1)).flatten()
    kept = solid[nms(boxes[solid].float(), predicted_iou[solid], BOX_NMS)]
    strongest = torch.zeros(height * width, device=low_res.device)
    for logits in seen.enlarge(low_res[kept]):
        pixels, magnitude = outlines(logits, threshold)
        strongest.scatter_reduce_(0, pixels, magnitude, "amax")
    edges = strongest.reshape(height, width).cpu().numpy().astype(float)
    low, high = edges.min(), edges.max()
    edges = (edges - low) / (high - low) if high > low else np.zeros_like(edges)
    return suppress_non_maxima(edges)


def outlines(logits: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The outer boundaries of masks, and how steep their probabilities are there.

    Args:
        logits: (N, H, W).
        threshold: above it is the mask.

    Returns:
        Places y·W + x of the pixels that touch a mask and are not of it, of all masks (P,), and the Sobel magnitudes of
        that mask's probability there (P,).
    """
    height, width = logits.shape[1:]
    masks = F.pad(logits > threshold, (1, 1, 1, 1))
    rows = masks[:, :-2] | masks[:, 1:-1] | masks[:, 2:]
    touching = (rows[..., :-2] | rows[..., 1:-1] | rows[..., 2:]) & ~masks[:, 1:-1, 1:-1]
    mask, y, x = touching.nonzero(as_tuple=True)
    up, down, left, right = (
        (y - 1).clamp(min=0),
        (y + 1).clamp(max=height - 1),
        (x - 1).clamp(min=0),
        (x + 1).clamp(max=width - 1),
    )
    around = [logits[mask, row, column].sigmoid() for row in (up, y, down) for column in (left, x, right)]
    across = around[2] - around[0] + 2 * (around[5] - around[3]) + around[8] - around[6]
    along = around[6] - around[0] + 2 * (around[7] - around[1]) + around[8] - around[2]
    return y * width + x, torch.hypot(across, along)
