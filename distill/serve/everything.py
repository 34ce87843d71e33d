"""All that is in a picture: segment-anything's mask generator, whose encoder and decoder are an engine's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from segment_anything.utils.amg import MaskData

from distill.evaluate.everything import BoundedMaskGenerator
from distill.serve.embeddings import Embedding
from distill.serve.engines import Engine, Outline
from distill.serve.errors import Gone
from distill.serve.masks import AMBIGUOUS, described
from distill.serve.messages import Mask
from embeddings_cache.images import decode_rle

POINTS_AT_ONCE = {True: 8, False: 64}
"""Points of the grid that are decoded together, on a CPU and elsewhere: more only take more memory there."""


class EngineMaskGenerator(BoundedMaskGenerator):
    """The generator, on an embedding that is there.

    Args:
        engine: what decodes.
        embedding: of the picture.
        stopped: whether nobody waits for the masks any more; `Gone` is raised then.
        settings: of `SamAutomaticMaskGenerator`; without crops, which would have to be encoded.
    """

    def __init__(self, engine: Engine, embedding: Embedding, stopped: Callable[[], bool], **settings: Any) -> None:
        batch = POINTS_AT_ONCE[engine.on_cpu]
        super().__init__(Outline(engine.image_size), **settings, points_per_batch=batch, output_mode="coco_rle")
        self.engine, self.embedding, self.stopped = engine, embedding, stopped
        self.predictor.set_image = self._place

    def _place(self, image: np.ndarray) -> None:
        self.predictor.original_size, self.predictor.input_size = image.shape[:2], self.embedding.input_size

    def _process_batch(
        self, points: np.ndarray, im_size: tuple[int, ...], crop_box: list[int], orig_size: tuple[int, ...]
    ) -> MaskData:
        if self.stopped():
            raise Gone
        return super()._process_batch(points, im_size, crop_box, orig_size)

    def _decode(self, points: np.ndarray, im_size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """See the parent's."""
        clicks = self.predictor.transform.apply_coords(points, im_size)[:, None].astype(np.float32)
        low_res, ious = self.engine.decode(self.embedding.values, clicks, np.ones(clicks.shape[:2], np.float32))
        return torch.from_numpy(low_res[:, AMBIGUOUS]), torch.from_numpy(ious[:, AMBIGUOUS])


def everything_of(
    engine: Engine,
    embedding: Embedding,
    settings: dict[str, Any],
    kind: str,
    tolerance: float,
    stopped: Callable[[], bool],
) -> list[Mask]:
    """All masks of a picture that the generator keeps, those with the highest predicted IoU first.

    Raises:
        Gone: `stopped` said so.
    """
    generator = EngineMaskGenerator(engine, embedding, stopped, **settings)
    # It only asks the picture for its size.
    shape = np.broadcast_to(np.uint8(0), (*embedding.original_size, 3))
    found = []
    for record in generator.generate(shape):
        if stopped():
            raise Gone
        mask = decode_rle(record["segmentation"])
        made = described(mask - np.float32(0.5), record["predicted_iou"], kind, tolerance)
        made.point_coords = [tuple(point) for point in record["point_coords"]]
        made.stability_score = record["stability_score"]
        found.append(made)
    return found
