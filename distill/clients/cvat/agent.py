"""The model for CVAT Online and Enterprise, at work on a machine of your own: an interaction function of
`cvat_sdk.auto_annotation` (2.73 or newer), which `cvat-cli function create-native` and `run-agent` take.

Frames, clicks and boxes come in, masks go out; README.md has the commands.
"""

import sys
from pathlib import Path

import cvat_sdk.auto_annotation as cvataa
import cvat_sdk.models as models
import numpy as np
from cvat_sdk.masks import encode_mask
from PIL import Image

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))  # cvat-cli opens this file by its path, and knows nothing of those beside it

from segmenter import Segmenter, to_rgb  # noqa: E402

Embedded = tuple[np.ndarray, tuple[int, int]]
"""An embedding, float32 (1, C, h, w), and (width, height) of its picture."""


class InteractionFunction:
    """What an agent calls.

    Args:
        segmenter: the two files, opened.
    """

    spec = cvataa.InteractionFunctionSpec(min_pos_points=0, min_neg_points=0, min_bounding_boxes=0)

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter

    def preprocess_image(self, context: cvataa.InteractionFunctionContext, image: Image.Image) -> Embedded:
        """The embedding of a frame; the agent keeps it while clicks on that frame come in.

        Raises:
            segmenter.BadPicture: the frame is too elongated.
        """
        return self.segmenter.embed(to_rgb(image)), image.size

    def detect(
        self, context: cvataa.InteractionFunctionContext, pp_image: Embedded, prompts: cvataa.InteractionPrompts
    ) -> list[cvataa.InteractionResultShape]:
        """The mask of one object, with the decoder's confidence in it; none without a prompt, or where it is empty."""
        points = [*prompts.pos_points, *prompts.neg_points]
        labels = [1] * len(prompts.pos_points) + [0] * len(prompts.neg_points)
        box = None if prompts.bounding_box is None else [side for corner in prompts.bounding_box for side in corner]
        if not points and box is None:
            return []
        answer = self.segmenter.segment(*pp_image, points, labels, box)
        if not answer.mask.any():
            return []
        confidence = models.AttributeValRequest(
            spec_id=cvataa.InteractionResultAttributes.CONFIDENCE, value=f"{min(max(answer.predicted_iou, 0), 1):.4f}"
        )
        return [cvataa.InteractionResultShape(type="mask", points=encode_mask(answer.mask), attributes=[confidence])]


def create(folder: str = str(FOLDER), providers: str = "", threads: int = 0) -> InteractionFunction:
    """The function, as `cvat-cli` asks for it.

    Args:
        folder: where `encoder.onnx` and `decoder.onnx` lie.
        providers: ONNX Runtime's execution providers, with commas between; default: CUDA where it is, and the CPU.
        threads: of one run; default: ONNX Runtime's own choice.

    Raises:
        RuntimeError: encoder and decoder do not belong together.
    """
    wanted = [name.strip() for name in providers.split(",") if name.strip()]
    segmenter = Segmenter(Path(folder), wanted or None, threads, cache_mb=0)
    segmenter.warm_up()
    return InteractionFunction(segmenter)
