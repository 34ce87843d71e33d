"""Everything in a photograph of any size, by any SAM: segment-anything's own mask generator, in bounded memory."""

from typing import Any

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.utils.amg import (
    MaskData,
    batched_mask_to_box,
    calculate_stability_score,
    is_box_near_crop_edge,
    mask_to_rle_pytorch,
    uncrop_masks,
)

from distill.evaluate.decoding import PIXELS_AT_ONCE, Segmenter


def everything(segmenter: Segmenter, image: np.ndarray, **settings: Any) -> list[dict[str, Any]]:
    """All masks of a photograph that segment-anything's generator keeps.

    Args:
        segmenter: a SAM, which is to encode the photograph at its precision.
        image: RGB uint8 (H, W, 3).
        settings: what is to be other than segment-anything's defaults; see `SamAutomaticMaskGenerator`.

    Returns:
        Its records with COCO RLEs, and unless there are crops those with the highest predicted IoU first. Of a ViT at
        float32 they are its own to the bit; a student's norms are folded, which rounds otherwise.

    Raises:
        InputError: the photograph is too elongated.
    """
    generator = BoundedMaskGenerator(segmenter.sam, **settings, output_mode="coco_rle")
    generator.predictor = SegmentersPredictor(segmenter)
    return generator.generate(image)


class SegmentersPredictor(SamPredictor):
    """A predictor whose embeddings are a segmenter's, and not of `sam.image_encoder` as it is."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__(segmenter.sam)
        self.segmenter = segmenter

    def set_image(self, image: np.ndarray) -> None:
        """Encode RGB uint8 (H, W, 3), a photograph or a crop of one."""
        seen = self.segmenter.look(image)
        self.features, self.original_size, self.input_size = seen.embedding, seen.original_size, seen.input_size
        self.is_image_set = True


class BoundedMaskGenerator(SamAutomaticMaskGenerator):
    """The same masks, with less work: masks that the decoder does not believe in are dropped before they are enlarged.

    segment-anything brings the three masks of all 64 points of a batch to the photograph's size first, which takes
    9 GB at 12 megapixels.
    """

    @torch.no_grad()
    def _process_batch(
        self, points: np.ndarray, im_size: tuple[int, ...], crop_box: list[int], orig_size: tuple[int, ...]
    ) -> MaskData:
        """Masks of some points (N, 2) in pixels of the crop, as its parent's, with `rles` in place of pixels."""
        low_res, predicted_iou = self._decode(points, im_size)
        data = MaskData(
            low_res=low_res.flatten(0, 1),
            iou_preds=predicted_iou.flatten(),
            points=torch.as_tensor(points.repeat(low_res.shape[1], axis=0)),
        )
        if self.pred_iou_thresh > 0.0:
            data.filter(data["iou_preds"] > self.pred_iou_thresh)
        parts = MaskData()
        # On its way to the photograph's size a mask has the encoder's.
        count = max(1, PIXELS_AT_ONCE // max(im_size[0] * im_size[1], self.predictor.model.image_encoder.img_size**2))
        places = torch.arange(len(data["low_res"]))
        for some in places.split(count) if len(places) else (places,):
            part = MaskData(**{name: values[some.to(values.device)] for name, values in data.items()})
            self._enlarge(part, crop_box, orig_size)
            parts.cat(part)
        return parts

    def _decode(self, points: np.ndarray, im_size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Three masks a point at the decoder's size, (N, 3, h, w) logits, and their predicted IoUs (N, 3)."""
        predictor: Any = self.predictor
        prompts = torch.as_tensor(predictor.transform.apply_coords(points, im_size), device=predictor.device)
        ones = torch.ones(len(prompts), 1, dtype=torch.int, device=prompts.device)
        sparse, dense = predictor.model.prompt_encoder(points=(prompts[:, None], ones), boxes=None, masks=None)
        return predictor.model.mask_decoder(
            image_embeddings=predictor.features,
            image_pe=predictor.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )

    def _enlarge(self, data: MaskData, crop_box: list[int], orig_size: tuple[int, ...]) -> None:
        """`low_res` (M, h, w) → boxes and `rles` of the masks that are stable and lie within the crop."""
        predictor: Any = self.predictor
        height, width = orig_size
        threshold = predictor.model.mask_threshold
        low_res = data["low_res"][:, None]
        masks = predictor.model.postprocess_masks(low_res, predictor.input_size, predictor.original_size)[:, 0]
        del data["low_res"]
        stability = calculate_stability_score(masks, threshold, self.stability_score_offset)
        data["stability_score"], data["masks"] = stability, masks > threshold
        del masks
        if self.stability_score_thresh > 0.0:
            data.filter(stability >= self.stability_score_thresh)
        data["boxes"] = batched_mask_to_box(data["masks"])
        inside = ~is_box_near_crop_edge(data["boxes"], crop_box, [0, 0, width, height])
        if not torch.all(inside):
            data.filter(inside)
        data["rles"] = mask_to_rle_pytorch(uncrop_masks(data["masks"], crop_box, height, width))
        del data["masks"]
