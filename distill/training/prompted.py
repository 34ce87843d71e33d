"""A frozen decoder at work on a batch: prompts → masks of an embedding, and points that correct them."""

from dataclasses import dataclass

import torch
from segment_anything.modeling import Sam

from distill.training.prompts import MaskPrompts

FOREGROUND, BACKGROUND, NO_POINT = 1, 0, -1
"""Labels of points, as SAM's prompt encoder takes them; the last is its padding."""


@dataclass(frozen=True)
class Corrections:
    """Points that follow the prompts, T a prompt: float32 (B, P, T, 2) as (x, y) and their labels (B, P, T)."""

    coords: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def none_yet(cls, prompts: MaskPrompts) -> "Corrections":
        """Before the first round."""
        coords = prompts.points.new_empty(*prompts.draws.shape[:2], 0, 2)
        return cls(coords, coords[..., 0])

    def and_one(self, where: torch.Tensor, label: torch.Tensor) -> "Corrections":
        """A point more: (B, P, 2) and (B, P)."""
        return Corrections(
            torch.cat([self.coords, where[:, :, None]], dim=2), torch.cat([self.labels, label[:, :, None]], dim=2)
        )


class PromptedDecoder:
    """Prompt encoder and mask decoder of a SAM, frozen; the gradient goes through them into the embedding."""

    def __init__(self, sam: Sam) -> None:
        self.prompt_encoder, self.mask_decoder = sam.prompt_encoder, sam.mask_decoder
        self.image_size = self.prompt_encoder.input_image_size[0]
        for part in (self.prompt_encoder, self.mask_decoder):
            part.requires_grad_(False)
        self.image_pe = self.prompt_encoder.get_dense_pe()

    def tokens(self, prompts: MaskPrompts, added: Corrections) -> torch.Tensor:
        """Tokens (B, N + M, T, C): points and boxes have as many, since a point alone is padded with one."""
        clicked = prompts.points.shape[1]
        points = torch.cat([prompts.points[:, :, None], added.coords[:, :clicked]], dim=2)
        kinds = torch.cat([torch.ones_like(points[:, :, :1, 0]) * FOREGROUND, added.labels[:, :clicked]], dim=2)
        corrected = None
        if added.coords.shape[2]:
            corrected = added.coords[:, clicked:].flatten(0, 1), added.labels[:, clicked:].flatten(0, 1)
        tokens = []
        # float32 always: positions within a large image need it.
        with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
            if clicked:
                of_points, _ = self.prompt_encoder((points.flatten(0, 1), kinds.flatten(0, 1)), None, None)
                tokens.append(of_points.unflatten(0, points.shape[:2]))
            if prompts.boxes.shape[1]:
                of_boxes, _ = self.prompt_encoder(corrected, prompts.boxes.flatten(0, 1), None)
                tokens.append(of_boxes.unflatten(0, prompts.boxes.shape[:2]))
        return torch.cat(tokens, dim=1)

    def masks(self, embedding: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All masks of all prompts: logits (B, N + M, 4, 4h, 4w) and predicted IoUs (B, N + M, 4), float32."""
        _, dense = self.prompt_encoder(None, None, None)

        def decode_image(image: torch.Tensor, prompted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.mask_decoder.predict_masks(image[None], self.image_pe, prompted, dense)

        masks, predicted_iou = torch.vmap(decode_image)(embedding, tokens)  # the decoder itself takes one image
        return masks.float(), predicted_iou.float()

    def correct(
        self,
        added: Corrections,
        ours: torch.Tensor,
        right: torch.Tensor,
        inside: torch.Tensor,
        draws: torch.Tensor,
    ) -> Corrections:
        """A point a prompt more, where boolean masks (B, P, h, w) differ; see `disagreement`."""
        where, label = disagreement(ours, right, inside, draws)
        # The centre of a low-resolution pixel; the prompt encoder adds half an input pixel.
        return added.and_one((where + 0.5) * (self.image_size / ours.shape[-1]) - 0.5, label)


def masks_asked(ambiguous: int, prompts: int, masks: int) -> torch.Tensor:
    """Weights (prompts, masks), for a prompt 1 in sum: of the first `ambiguous` ones all but mask 0, else mask 0.

    A single point is ambiguous, and users of `SamPredictor` are told to ask for SAM's three masks; elsewhere for its
    single mask (arXiv:2304.02643, section 3).
    """
    asked = torch.zeros(prompts, masks)
    asked[:ambiguous, 1:] = 1 / (masks - 1)
    asked[ambiguous:, 0] = 1
    return asked


def best_masks(masks: torch.Tensor, predicted_iou: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Which pixels belong to each prompt's mask: of those asked for, that with the highest predicted IoU.

    Args:
        masks: logits (B, P, K, h, w).
        predicted_iou: (B, P, K), not necessarily of these masks.
        asked: (P, K), 0 for masks that are not asked for.

    Returns:
        Boolean (B, P, h, w).
    """
    best = predicted_iou.masked_fill(asked == 0, -torch.inf).argmax(dim=2)[:, :, None, None, None]
    return masks.detach().take_along_dim(best, dim=2)[:, :, 0] > 0


def disagreement(
    ours: torch.Tensor, right: torch.Tensor, inside: torch.Tensor, draws: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A point a mask, evenly drawn among the pixels where it is not as it should be.

    Args:
        ours, right: boolean masks (B, P, H, W).
        inside: boolean, broadcastable to them; no point goes elsewhere.
        draws: float32 (B, P) in [0, 1).

    Returns:
        Pixels float32 (B, P, 2) as (x, y), and labels (B, P): `FOREGROUND` where the right mask has the pixel,
        `BACKGROUND` where it has not, `NO_POINT` where nothing is to be corrected.
    """
    disagree = ((ours ^ right) & inside).flatten(2)
    count = disagree.sum(dim=2)
    chosen = (draws * count).long().clamp_max(count - 1)
    place = (disagree.cumsum(dim=2) > chosen[:, :, None]).to(torch.uint8).argmax(dim=2)
    label = right.flatten(2).take_along_dim(place[:, :, None], dim=2)[:, :, 0].float()
    width = ours.shape[-1]
    where = torch.stack([place % width, place.div(width, rounding_mode="floor")], dim=2).float()
    return where, label.masked_fill(count == 0, NO_POINT)


def pixels_inside(input_size: torch.Tensor, image_size: int, side: int) -> torch.Tensor:
    """Which pixels of a square grid over the encoder's input show something of the image, not padding alone.

    Args:
        input_size: int (B, 2), height and width of each image in pixels of the input.
        image_size: side of the input.
        side: of the grid.

    Returns:
        Boolean (B, side, side).
    """
    starts = torch.arange(side, device=input_size.device) * (image_size / side)
    rows, columns = (starts < input_size[:, axis, None] for axis in (0, 1))
    return rows[:, :, None] & columns[:, None, :]
