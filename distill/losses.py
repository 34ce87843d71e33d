"""What a student is trained to make small."""

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LOSSES: dict[str, Loss] = {
    # Decoupled distillation: MobileSAM (arXiv:2306.14289), section 3.2.
    "mse": F.mse_loss,
}


def weighted_loss(weights: Mapping[str, float]) -> Loss:
    """Sum of `LOSSES` by weight, over student and teacher embeddings, float32 (B, C, h, w) both; a scalar."""

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        terms = [weight * LOSSES[name](student, teacher) for name, weight in weights.items() if weight]
        return torch.stack(terms).sum()

    return loss


def embedding_errors(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per image: mean squared error, and cosine over channels averaged over cells; float32 (B,) each."""
    mse = (student - teacher).square().mean(dim=(1, 2, 3))
    return mse, F.cosine_similarity(student, teacher, dim=1).mean(dim=(1, 2))
