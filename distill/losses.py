"""What a student is trained to make small: distances between its embedding and the teacher's, and between masks."""

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from distill.training.mask_loss import MaskLoss, pixels_inside
from distill.training.prompts import MaskPrompts

PerCell = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

EMBEDDING_LOSSES: dict[str, PerCell] = {
    # Decoupled distillation: MobileSAM (arXiv:2306.14289), section 3.2.
    "mse": lambda student, teacher: (student - teacher).square().mean(dim=1),
    "cosine": lambda student, teacher: 1 - F.cosine_similarity(student, teacher, dim=1),
}
"""By name: embeddings (B, C, h, w) both → a distance for each cell, (B, h, w)."""


class Objective:
    """The losses of a recipe, each a mean over images in which every image counts alike.

    So a mean over processes is the mean over the whole batch, whatever the images' shapes and annotations.
    """

    def __init__(self, image_size: int, ignore_padding: bool = False, masks: MaskLoss | None = None) -> None:
        self.image_size, self.ignore_padding, self.masks = image_size, ignore_padding, masks

    def __call__(
        self,
        weights: Mapping[str, float],
        student: torch.Tensor,
        teacher: torch.Tensor,
        input_size: torch.Tensor,
        prompts: MaskPrompts | None = None,
    ) -> dict[str, torch.Tensor]:
        """The losses that have a weight, unweighted, scalars by name.

        Args:
            weights: by name of the loss.
            student, teacher: embeddings, float32 (B, C, h, w).
            input_size: int (B, 2), height and width of each image within the encoder's square input.
            prompts: what the loss `mask` asks both for.
        """
        terms = {}
        counted = self._counted(teacher, input_size)
        for name in (name for name, weight in weights.items() if weight):
            if name in EMBEDDING_LOSSES:
                distances = EMBEDDING_LOSSES[name](student, teacher)
                terms[name] = ((distances * counted).sum(dim=(1, 2)) / counted.sum(dim=(1, 2))).mean()
            else:
                assert self.masks is not None
                assert prompts is not None
                terms[name] = self.masks(student, teacher, input_size, prompts)
        return terms

    def _counted(self, embedding: torch.Tensor, input_size: torch.Tensor) -> torch.Tensor:
        """1 for the cells that count, 0 for the others: float32 (B, h, w)."""
        batch, _, height, width = embedding.shape
        if not self.ignore_padding:
            return embedding.new_ones(batch, height, width)
        return pixels_inside(input_size.to(embedding.device), self.image_size, height).to(embedding.dtype)


def embedding_errors(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per image: mean squared error, and cosine over channels averaged over cells; float32 (B,) each."""
    mse = (student - teacher).square().mean(dim=(1, 2, 3))
    return mse, F.cosine_similarity(student, teacher, dim=1).mean(dim=(1, 2))
