"""Prompts → masks of any SAM, in passes of bounded memory; and a SAM that has looked at a photograph."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

from embeddings_cache.images import Reading, decode_image, pad_pixels, reason_of, resize_longest_side
from embeddings_cache.system import whole_file
from embeddings_cache.teacher import TeacherEncoder
from students import InputError

PROMPTS_A_PASS = 32
PIXELS_AT_ONCE = 2**26
"""Of masks at the size of their photograph: 256 MiB of float32, and as much again while they are compared."""


@dataclass(frozen=True)
class Seen:
    """A photograph as a SAM sees it.

    Attributes:
        sam: whose prompt encoder and mask decoder are used.
        embedding: float32 (1, C, h, w).
        original_size: height and width of the photograph.
        input_size: the same after resizing.
    """

    sam: Sam
    embedding: torch.Tensor
    original_size: tuple[int, int]
    input_size: tuple[int, int]

    @torch.no_grad()
    def decode(
        self,
        *,
        points: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        boxes: np.ndarray | None = None,
        masks: torch.Tensor | None = None,
        multimask: bool = False,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the decoder makes of N prompts, each on its own, a few at a time.

        Args:
            points: (N, P, 2) as (x, y) in pixels of the photograph.
            labels: (N, P), 1 on the object, 0 beside it, -1 for padding; default: all 1.
            boxes: (N, 4) as (x0, y0, x1, y1), likewise.
            masks: earlier low-resolution logits (N, 4h, 4w).
            multimask: three masks a prompt instead of one.

        Yields:
            Low-resolution logits (n, 1 or 3, 4h, 4w), and predicted IoUs (n, 1 or 3).
        """
        transform = ResizeLongestSide(self.sam.image_encoder.img_size)
        if points is not None:
            points = transform.apply_coords(points, self.original_size)
            labels = np.ones(points.shape[:2]) if labels is None else labels
        if boxes is not None:
            boxes = transform.apply_boxes(boxes, self.original_size)
        count = next(len(prompts) for prompts in (points, boxes, masks) if prompts is not None)
        positions = self.sam.prompt_encoder.get_dense_pe()
        for start in range(0, count, PROMPTS_A_PASS):
            some = slice(start, start + PROMPTS_A_PASS)
            sparse, dense = self.sam.prompt_encoder(
                points=(self._tensor(points[some]), self._tensor(labels[some], torch.int))
                if points is not None and labels is not None
                else None,
                boxes=self._tensor(boxes[some]) if boxes is not None else None,
                masks=masks[some, None] if masks is not None else None,
            )
            yield self.sam.mask_decoder(
                image_embeddings=self.embedding,
                image_pe=positions,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask,
            )

    def enlarge(self, low_res: torch.Tensor) -> Iterator[torch.Tensor]:
        """Low-resolution logits (N, 4h, 4w) → logits of the photograph's size (n, H, W), as many as memory is for."""
        height, width = self.original_size
        # On its way to the photograph's size a mask has the encoder's.
        largest = max(height * width, self.sam.image_encoder.img_size**2)
        for few in low_res[:, None].split(max(1, PIXELS_AT_ONCE // largest)):
            if len(few):
                yield self.sam.postprocess_masks(few, self.input_size, self.original_size)[:, 0]

    def _tensor(self, values: np.ndarray, dtype: torch.dtype = torch.float) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.embedding.device)


class Segmenter:
    """A SAM at work on photographs, its encoder at a precision.

    Args:
        sam: encoder, prompt encoder and decoder.
        dtype: of most of the encoder; see `resolve_dtype`.
    """

    def __init__(self, sam: Sam, device: torch.device, dtype: str = "float32") -> None:
        self.sam = sam.to(device)
        self.encoder = TeacherEncoder(sam, device, dtype, batch_size=1)

    def look(self, image: np.ndarray) -> Seen:
        """Encode RGB uint8 (H, W, 3), as `SamPredictor.set_image` does.

        Raises:
            InputError: the photograph is too elongated.
        """
        try:
            pixels = resize_longest_side(image, self.encoder.image_size)
        except ValueError as error:
            raise InputError(str(error)) from error
        input_size = (pixels.shape[0], pixels.shape[1])
        embedding = self.encoder(pad_pixels(pixels, self.encoder.image_size)[None], torch.tensor([input_size]))
        return Seen(self.sam, embedding, (image.shape[0], image.shape[1]), input_size)


def best_of(low_res: torch.Tensor, predicted_iou: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each prompt's masks (N, M, h, w) the one with the highest predicted IoU (N, M): (N, h, w), and that (N,)."""
    best = predicted_iou.argmax(dim=1)
    places = torch.arange(len(best), device=best.device)
    return low_res[places, best], predicted_iou[places, best]


@dataclass(frozen=True)
class Paired:
    """A photograph, and the file of what people have marked in it: an item of some tasks."""

    key: str
    image: Path
    truth: Path

    @property
    def files(self) -> Sequence[Path]:
        """Both."""
        return self.image, self.truth


def read_photograph(path: Path, reading: Reading) -> np.ndarray:
    """RGB uint8 (H, W, 3), upright.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    try:
        return decode_image(path.read_bytes(), reading)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # Pillow lets many kinds through
        raise InputError(f"{path}: cannot be read: {reason_of(error)}") from error


def pair(images: Sequence[Path], truths: Path, suffix: str) -> list[Paired]:
    """Photographs with the files of their names in another folder.

    Raises:
        InputError: one is not there.
    """
    items = [Paired(path.stem, path, truths / f"{path.stem}{suffix}") for path in images]
    if missing := [item.truth.name for item in items if not item.truth.exists()]:
        raise InputError(f"{truths} has no {missing[0]}, nor the files of {len(missing) - 1} other images")
    return items


def write_map(path: Path, values: np.ndarray) -> np.ndarray:
    """Keep a map in [0, 1] as a grey PNG of 8 bits; returns these levels, uint8 (H, W)."""
    levels = np.round(values * 255).astype(np.uint8)
    with whole_file(path) as temporary:
        Image.fromarray(levels).save(temporary, format="PNG")
    return levels
