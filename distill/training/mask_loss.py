"""Decoder-aware distillation: one decoder makes masks of both embeddings, and the student's are to be the teacher's.

EdgeSAM's prompt-in-the-loop distillation (arXiv:2312.06660, section 3.3) at a lower price: the teacher's embedding
comes from the cache, so that its encoder never runs again. Prompt encoder and mask decoder are frozen; the gradient
goes through the decoder into the student's embedding.
"""

import torch
from segment_anything.modeling import Sam
from torch.nn import functional as F

from distill.training.prompts import MaskPrompts

FOREGROUND, BACKGROUND, NO_POINT = 1, 0, -1
"""Labels of points, as SAM's prompt encoder takes them; the last is its padding."""

EPSILON = 1e-3
"""Of a pixel: makes the dice of two masks that are surely empty 1."""


class MaskLoss:
    """Binary cross entropy and dice between the student's masks and the teacher's, with corrective points.

    Where a prompt is ambiguous, a single point, SAM's three masks are compared; elsewhere its single mask, as users of
    `SamPredictor` are told to ask for them (arXiv:2304.02643, section 3).
    """

    def __init__(self, decoder: Sam) -> None:
        self.prompt_encoder, self.mask_decoder = decoder.prompt_encoder, decoder.mask_decoder
        self.image_size = self.prompt_encoder.input_image_size[0]
        for part in (self.prompt_encoder, self.mask_decoder):
            part.requires_grad_(False)
        self.image_pe = self.prompt_encoder.get_dense_pe()

    def __call__(
        self, student: torch.Tensor, teacher: torch.Tensor, input_size: torch.Tensor, prompts: MaskPrompts
    ) -> torch.Tensor:
        """Mean over images, prompts and rounds: first the prompts alone, then with a correction more each round.

        Args:
            student, teacher: embeddings, float32 (B, C, h, w).
            input_size: int (B, 2), height and width of each image within the encoder's input.
            prompts: as many for each image; `draws` says how many rounds of corrections.

        Returns:
            A scalar; 0 where the masks agree in every pixel's probability.
        """
        clicked, rounds = prompts.points.shape[1], prompts.draws.shape[2]
        coords = prompts.points.new_empty(*prompts.draws.shape[:2], 0, 2)
        labels = coords[..., 0]
        losses = []
        for number in range(rounds + 1):
            sparse = self._encode(prompts, coords, labels)
            ours, _ = self._decode(student, sparse)
            with torch.no_grad():
                theirs, predicted_iou = self._decode(teacher, sparse)
            inside = pixels_inside(input_size.to(theirs.device), self.image_size, theirs.shape[-1])[:, None]
            asked = masks_asked(clicked if number == 0 else 0, *theirs.shape[1:3]).to(theirs.device)
            losses.append((mask_distance(ours, theirs, inside[:, None]) * asked).sum(dim=2).mean())
            if number < rounds:
                best = predicted_iou.masked_fill(asked == 0, -torch.inf).argmax(dim=2)[:, :, None, None, None]
                ours_best, theirs_best = (m.detach().take_along_dim(best, dim=2)[:, :, 0] > 0 for m in (ours, theirs))
                where, label = corrections(ours_best, theirs_best, inside, prompts.draws[:, :, number])
                # The centre of a low-resolution pixel; the prompt encoder adds half an input pixel.
                where = (where + 0.5) * (self.image_size / theirs.shape[-1]) - 0.5
                coords = torch.cat([coords, where[:, :, None]], dim=2)
                labels = torch.cat([labels, label[:, :, None]], dim=2)
        return torch.stack(losses).mean()

    def _encode(self, prompts: MaskPrompts, coords: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N + M, T, C): points and boxes have as many, since a point alone is padded with one."""
        clicked = prompts.points.shape[1]
        points = torch.cat([prompts.points[:, :, None], coords[:, :clicked]], dim=2)
        kinds = torch.cat([torch.ones_like(points[:, :, :1, 0]) * FOREGROUND, labels[:, :clicked]], dim=2)
        corrected = (coords[:, clicked:].flatten(0, 1), labels[:, clicked:].flatten(0, 1)) if coords.shape[2] else None
        # float32 always: positions within a large image need it.
        with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
            of_points, _ = self.prompt_encoder((points.flatten(0, 1), kinds.flatten(0, 1)), None, None)
            tokens = [of_points.unflatten(0, points.shape[:2])]
            if prompts.boxes.shape[1]:
                of_boxes, _ = self.prompt_encoder(corrected, prompts.boxes.flatten(0, 1), None)
                tokens.append(of_boxes.unflatten(0, prompts.boxes.shape[:2]))
        return torch.cat(tokens, dim=1)

    def _decode(self, embedding: torch.Tensor, sparse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All masks of all prompts: logits (B, N + M, 4, 4h, 4w) and predicted IoUs (B, N + M, 4), float32."""
        _, dense = self.prompt_encoder(None, None, None)

        def decode_image(image: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.mask_decoder.predict_masks(image[None], self.image_pe, tokens, dense)

        masks, predicted_iou = torch.vmap(decode_image)(embedding, sparse)  # the decoder itself takes one image
        return masks.float(), predicted_iou.float()


def masks_asked(ambiguous: int, prompts: int, masks: int) -> torch.Tensor:
    """Weights (prompts, masks), for a prompt 1 in sum: of the first `ambiguous` ones all but mask 0, else mask 0."""
    asked = torch.zeros(prompts, masks)
    asked[:ambiguous, 1:] = 1 / (masks - 1)
    asked[ambiguous:, 0] = 1
    return asked


def mask_distance(student: torch.Tensor, teacher: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Cross entropy and dice loss of masks, each 0 where the probabilities are equal and not below 0 anywhere.

    The teacher's probabilities are the target. Of the cross entropy their own entropy is subtracted, which has no
    gradient. Dice is 1 − 2 Σpq / (Σp² + Σq²) (V-Net, arXiv:1606.04797, section 3): with squares, unlike with plain
    sums, it is least where p = q.

    Args:
        student, teacher: logits, float32 (..., H, W).
        inside: boolean, broadcastable to them; other pixels do not count.

    Returns:
        (...)
    """
    counted = inside.to(student.dtype).expand_as(student)
    p, q = student.sigmoid(), teacher.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(teacher, q, reduction="none")
    surplus = F.binary_cross_entropy_with_logits(student, q, reduction="none") - entropy
    cross_entropy = (surplus * counted).sum(dim=(-2, -1)) / counted.sum(dim=(-2, -1))
    overlap = (p * q * counted).sum(dim=(-2, -1))
    squares = ((p.square() + q.square()) * counted).sum(dim=(-2, -1))
    return cross_entropy + 1 - (2 * overlap + EPSILON) / (squares + EPSILON)


def corrections(
    student: torch.Tensor, teacher: torch.Tensor, inside: torch.Tensor, draws: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A point a mask, evenly drawn among the pixels where student and teacher disagree.

    Args:
        student, teacher: boolean masks (B, P, H, W).
        inside: boolean, broadcastable to them; no point goes elsewhere.
        draws: float32 (B, P) in [0, 1).

    Returns:
        Pixels float32 (B, P, 2) as (x, y), and labels (B, P): `FOREGROUND` where the teacher's mask has the pixel,
        `BACKGROUND` where it has not, `NO_POINT` where nothing is to be corrected.
    """
    disagree = ((student ^ teacher) & inside).flatten(2)
    count = disagree.sum(dim=2)
    chosen = (draws * count).long().clamp_max(count - 1)
    place = (disagree.cumsum(dim=2) > chosen[:, :, None]).to(torch.uint8).argmax(dim=2)
    label = teacher.flatten(2).take_along_dim(place[:, :, None], dim=2)[:, :, 0].float()
    width = student.shape[-1]
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
