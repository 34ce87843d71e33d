"""Prompts on an embedding → masks of the picture's size, as answers hold them."""

import base64
import binascii
import io
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from segment_anything.utils.transforms import ResizeLongestSide

from distill.export.decoder import BOTTOM_RIGHT, PAD, TOP_LEFT
from distill.serve.embeddings import Embedding
from distill.serve.engines import Engine, Outline
from distill.serve.errors import Gone, Refused
from distill.serve.messages import Mask, MasksRequest, Polygon, Prompt, Rle
from distill.serve.polygons import outlines
from embeddings_cache.images import encode_rle

PROMPTS_AT_ONCE = 8
"""On a CPU: more take more memory and no less time."""

LARGEST_LOGIT = 1e4
"""Of an earlier mask; SAM's are within a hundred or so, and the decoder makes no numbers of what is far beyond."""

AMBIGUOUS = slice(1, 4)
"""Of the decoder's four masks, those for a single click."""


def masks_of(
    engine: Engine, embedding: Embedding, request: MasksRequest, stopped: Callable[[], bool]
) -> list[list[Mask]]:
    """The masks of each prompt: one click is ambiguous, and of three masks the one with the best predicted IoU counts;
    a box, or more clicks, are clear. With `multimask` all three.

    Args:
        engine: what decodes.
        embedding: of the picture.
        request: the prompts, and how masks are to be written.
        stopped: whether nobody waits for the answer any more.

    Raises:
        Refused: a prompt is none, or lies outside of the picture.
        Gone: `stopped` said so.
    """
    prepared = [prepare(prompt, embedding, number) for number, prompt in enumerate(request.prompts)]
    answers: list[list[Mask]] = [[] for _ in prepared]
    for start in range(0, len(prepared), PROMPTS_AT_ONCE):
        if stopped():
            raise Gone
        some = range(start, min(start + PROMPTS_AT_ONCE, len(prepared)))
        coords, labels = filled_up([prepared[place][:2] for place in some])
        low_res, ious = engine.decode(embedding.values, coords, labels, [prepared[place][2] for place in some])
        for place, masks, predicted in zip(some, low_res, ious, strict=True):
            for number in chosen(predicted, clicks(request.prompts[place]), request.multimask):
                if stopped():
                    raise Gone
                logits = enlarge(masks[number], embedding)
                made = described(logits, float(predicted[number]), request.format, request.tolerance)
                if request.low_res:
                    made.low_res = base64.b64encode(masks[number].astype("<f4").tobytes()).decode()
                answers[place].append(made)
    return answers


def prepare(prompt: Prompt, embedding: Embedding, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A prompt as the decoder takes it: float32 (N, 2) in pixels of the resized picture, float32 (N,), and logits
    (4h, 4w) of an earlier mask, as `SamPredictor` hands them to the prompt encoder.

    Raises:
        Refused: it is none.
    """
    where = f"prompts[{number}]"
    points = np.array(prompt.points, np.float64).reshape(-1, 2)
    labels = [1] * len(points) if prompt.labels is None else prompt.labels
    if len(labels) != len(points):
        raise Refused(422, "bad_prompt", f"{where}: {len(points)} points have {len(labels)} labels")
    if not len(points) and prompt.box is None:
        raise Refused(422, "bad_prompt", f"{where} has neither points nor a box")
    corners = np.array([] if prompt.box is None else prompt.box, np.float64).reshape(-1, 2)
    height, width = embedding.original_size
    coords = np.concatenate([points, corners])
    if not ((coords >= 0) & (coords <= (width, height))).all():  # also where one is no number
        raise Refused(422, "bad_prompt", f"{where} lies outside of the picture, {width}×{height} px")
    if len(corners) and not (corners[0] < corners[1]).all():
        raise Refused(422, "bad_prompt", f"{where}: a box is x0, y0, x1, y1, with x0 < x1 and y0 < y1")
    kinds = [*labels, TOP_LEFT, BOTTOM_RIGHT] if len(corners) else labels
    coords = ResizeLongestSide(embedding.image_size).apply_coords(coords, embedding.original_size)
    earlier = None if prompt.mask_input is None else _earlier(prompt.mask_input, embedding.image_size // 4, where)
    return coords.astype(np.float32), np.array(kinds, np.float32), earlier


def clicks(prompt: Prompt) -> int:
    """How many points a prompt has, corners of a box included."""
    return len(prompt.points) + 2 * (prompt.box is not None)


def chosen(predicted: np.ndarray, given: int, multimask: bool) -> Sequence[int]:
    """Which of the decoder's four masks are answered, by their predicted IoUs (4,) and the number of clicks."""
    if multimask:
        return range(4)[AMBIGUOUS]
    return [AMBIGUOUS.start + int(predicted[AMBIGUOUS].argmax()) if given == 1 else 0]


def enlarge(low_res: np.ndarray, embedding: Embedding) -> np.ndarray:
    """Logits (4h, 4w) → logits of the picture's size (H, W), as `SamPredictor` does."""
    masks = torch.from_numpy(np.ascontiguousarray(low_res))[None, None]
    outline = Outline(embedding.image_size)
    with torch.inference_mode():
        return outline.postprocess_masks(masks, embedding.input_size, embedding.original_size)[0, 0].numpy()


def described(logits: np.ndarray, predicted_iou: float, kind: str, tolerance: float) -> Mask:
    """A mask as answers hold it, from logits (H, W): `rle`, `png` or `polygons`."""
    mask = logits > 0
    rle = encode_rle(mask)
    made = Mask(predicted_iou, int(coco_mask.area(rle)), coco_mask.toBbox(rle).tolist())
    if kind == "rle":
        made.rle = Rle(**rle)
    elif kind == "png":
        made.png = _as_png(mask)
    else:
        made.polygons = [
            Polygon(_flat(outer), [_flat(hole) for hole in holes]) for outer, holes in outlines(logits, tolerance)
        ]
    return made


class Stop:
    """Tells a thread that nobody waits for what it does."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        """From now on."""
        self._event.set()


def filled_up(prompts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts (N, 2) and (N,) of whatever lengths as one (P, N, 2) and (P, N): with points that are not there."""
    longest = max(len(labels) for _, labels in prompts)
    coords = np.zeros((len(prompts), longest, 2), np.float32)
    kinds = np.full((len(prompts), longest), PAD, np.float32)
    for place, (points, labels) in enumerate(prompts):
        coords[place, : len(labels)], kinds[place, : len(labels)] = points, labels
    return coords, kinds


def _earlier(text: str, side: int, where: str) -> np.ndarray:
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except (ValueError, binascii.Error):
        values = np.empty(0, np.float32)
    if values.shape != (side**2,) or not (np.abs(values) <= LARGEST_LOGIT).all():
        raise Refused(422, "bad_prompt", f"{where}.mask_input is no `low_res` of an earlier answer")
    return values.reshape(side, side).astype(np.float32)


def _as_png(mask: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG", compress_level=3)
    return base64.b64encode(file.getvalue()).decode()


def _flat(ring: np.ndarray) -> list[float]:
    return ring.round(2).ravel().tolist()
