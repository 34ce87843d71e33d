"""What a student is trained to make small: distances between its embedding and the teacher's, and between masks."""

from collections.abc import Callable

import torch
from segment_anything.modeling import Sam
from torch.nn import functional as F

from distill.schema import TEACHER_MASK_LOSSES, TrainRecipe
from distill.training.mask_loss import mask_loss
from distill.training.plan import weighs_masks
from distill.training.prompted import PromptedDecoder, pixels_inside
from distill.training.prompts import MaskPrompts
from distill.training.truth_loss import truth_loss

PerCell = Callable[[torch.Tensor, torch.Tensor, TrainRecipe], torch.Tensor]

EMBEDDING_LOSSES: dict[str, PerCell] = {
    # Decoupled distillation: MobileSAM (arXiv:2306.14289), section 3.2.
    "mse": lambda student, teacher, _: (student - teacher).square().mean(dim=1),
    "l1": lambda student, teacher, _: (student - teacher).abs().mean(dim=1),
    # Huber (1964), Robust estimation of a location parameter: d²/2 up to delta, delta (d − delta/2) beyond.
    "huber": lambda student, teacher, settings: F.huber_loss(
        student, teacher, reduction="none", delta=settings.huber_delta
    ).mean(dim=1),
    "cosine": lambda student, teacher, _: 1 - F.cosine_similarity(student, teacher, dim=1),
}
"""By name: embeddings (B, C, h, w) both → a distance for each cell, (B, h, w)."""


class Objective:
    """The losses of a recipe, each a mean over images in which every image counts alike.

    So a mean over processes is the mean over the whole batch, whatever the images' shapes and annotations.

    Args:
        image_size: side of the encoder's input.
        sam: whose prompt encoder and mask decoder make masks, which freezes them; None where no loss is of masks.
    """

    def __init__(self, image_size: int, sam: Sam | None = None) -> None:
        self.image_size = image_size
        self.decoder = PromptedDecoder(sam) if sam is not None else None

    def __call__(
        self,
        settings: TrainRecipe,
        student: torch.Tensor,
        teacher: torch.Tensor,
        input_size: torch.Tensor,
        prompts: MaskPrompts | None = None,
    ) -> dict[str, torch.Tensor]:
        """The losses that have a weight, unweighted, scalars by name.

        Args:
            settings: of the phase.
            student, teacher: embeddings, float32 (B, C, h, w).
            input_size: int (B, 2), height and width of each image within the encoder's square input.
            prompts: what losses of masks ask for.
        """
        names = [name for name, weight in settings.loss.items() if weight]
        terms = {}
        counted = self._counted(teacher, input_size, settings.ignore_padding)
        for name in (name for name in names if name in EMBEDDING_LOSSES):
            distances = EMBEDDING_LOSSES[name](student, teacher, settings)
            terms[name] = ((distances * counted).sum(dim=(1, 2)) / counted.sum(dim=(1, 2))).mean()
        if weighs_masks(settings, TEACHER_MASK_LOSSES):
            assert self.decoder is not None
            assert prompts is not None
            entropy, dice = mask_loss(self.decoder, student, teacher, input_size, prompts, settings.mask_targets)
            terms |= {"mask": entropy + dice, "mask_bce": entropy, "mask_dice": dice}
        if "truth" in names:
            assert self.decoder is not None
            assert prompts is not None
            terms["truth"] = truth_loss(self.decoder, student, input_size, prompts)
        return {name: terms[name] for name in names}

    def _counted(self, embedding: torch.Tensor, input_size: torch.Tensor, ignore_padding: bool) -> torch.Tensor:
        """1 for the cells that count, 0 for the others: float32 (B, h, w)."""
        batch, _, height, width = embedding.shape
        if not ignore_padding:
            return embedding.new_ones(batch, height, width)
        return pixels_inside(input_size.to(embedding.device), self.image_size, height).to(embedding.dtype)


def embedding_errors(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per image: mean squared error, and cosine over channels averaged over cells; float32 (B,) each."""
    mse = (student - teacher).square().mean(dim=(1, 2, 3))
    return mse, F.cosine_similarity(student, teacher, dim=1).mean(dim=(1, 2))
