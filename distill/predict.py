"""Predict: the student's masks on one photograph, through segment-anything's own predictor and mask generator."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from distill.evaluate import decoding
from distill.evaluate.everything import BoundedMaskGenerator
from distill.evaluate.masks import load_sams
from distill.pictures import draw_prompts, paint
from distill.reading import reading_of
from distill.recipe import Recipe
from distill.run import other_teacher
from distill.schema import PredictRecipe, numbers
from embeddings_cache.images import bounding_box, decode_rle, encode_rle, resized_shape
from embeddings_cache.system import whole_file, write_json
from students import InputError


@dataclass(frozen=True)
class Prediction:
    """One mask at the photograph's size as COCO's RLE, for there may be hundreds, and the IoU that the decoder expects
    it to have."""

    segmentation: dict[str, Any]
    predicted_iou: float

    @property
    def mask(self) -> np.ndarray:
        """Boolean (H, W)."""
        return decode_rle(self.segmentation)


def predict(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Segment `image` with the chosen student: what the prompts name, or everything where there are none.

    Writes to `predict/` of the run directory, NAME being the photograph's: `NAME-mask.png` (0 and 255; without
    prompts, 16 bits and the number of the mask, 0 where there is none), `NAME-overlay.png`, and `NAME.json` with the
    predicted IoU, box, area and COCO RLE of each mask, the largest first.

    Raises:
        InputError: no student, no readable image, or a prompt that lies outside of it.
    """
    image = read_photograph(recipe)
    points, box = prompts_within(recipe, image)
    teacher, student_sam = load_sams(recipe, accelerator.device)
    if line := other_teacher(recipe, teacher):
        accelerator.print(f"predict: {line}")
    if accelerator.is_main_process:
        prompted = points is not None or box is not None
        found = (
            [from_prompts(student_sam, image, points, box)]
            if prompted
            else everything(student_sam, image, recipe.predict)
        )
        stem = Path(recipe.run_dir) / "predict" / Path(recipe.image or "").stem
        written = write_prediction(stem, image, found, points, box)
        if prompted:
            accelerator.print(f"predict: predicted IoU {found[0].predicted_iou:.3f}, {found[0].mask.sum()} pixels")
        else:
            accelerator.print(f"predict: {len(found)} masks")
        for path in written:
            accelerator.print(f"  {path}")
    accelerator.wait_for_everyone()
    return True


def read_photograph(recipe: Recipe) -> np.ndarray:
    """RGB uint8 (H, W, 3) of `image`, upright.

    Raises:
        InputError: none is named, or it cannot be read or resized.
    """
    path = recipe.image
    if path is None:
        raise InputError("stage=predict needs a photograph: image=FILE")
    try:
        image = decoding.read_photograph(Path(path), reading_of(recipe))
        resized_shape((image.shape[0], image.shape[1]), recipe.image_size)
    except (InputError, ValueError) as error:
        raise InputError(f"image={error}" if isinstance(error, InputError) else f"image={path}: {error}") from error
    return image


def prompts_within(recipe: Recipe, image: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The recipe's points (N, 2) and box (4,), in pixels of the photograph; None for those not given.

    Raises:
        InputError: one lies outside of the image.
    """
    height, width = image.shape[:2]
    limits = np.array([width, height])
    points = np.array(numbers(recipe.point)).reshape(-1, 2) if recipe.point else None
    box = np.array(numbers(recipe.box)) if recipe.box else None
    for name, corners in (("point", points), ("box", box.reshape(2, 2) if box is not None else None)):
        if corners is not None and ((corners < 0) | (corners > limits)).any():
            raise InputError(f"{name}={getattr(recipe, name)} lies outside of the image, {width}×{height} px")
    return points, box


def from_prompts(sam: Sam, image: np.ndarray, points: np.ndarray | None, box: np.ndarray | None) -> Prediction:
    """The mask of one object. A single point is ambiguous: of three masks the one with the best predicted IoU."""
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    ambiguous = box is None and points is not None and len(points) == 1
    masks, ious, _ = predictor.predict(
        point_coords=points,
        point_labels=np.ones(len(points), dtype=int) if points is not None else None,
        box=box,
        multimask_output=ambiguous,
    )
    best = int(np.argmax(ious))
    return Prediction(encode_rle(masks[best]), float(ious[best]))


def everything(sam: Sam, image: np.ndarray, settings: PredictRecipe) -> list[Prediction]:
    """All masks that segment-anything's own generator keeps, the largest first."""
    found = BoundedMaskGenerator(sam, **vars(settings), output_mode="coco_rle").generate(image)
    found.sort(key=lambda entry: -entry["area"])
    return [Prediction(entry["segmentation"], float(entry["predicted_iou"])) for entry in found]


def write_prediction(
    stem: Path, image: np.ndarray, found: list[Prediction], points: np.ndarray | None, box: np.ndarray | None
) -> list[Path]:
    """Write mask, overlay and JSON as STEM-mask.png, STEM-overlay.png and STEM.json."""
    prompted = points is not None or box is not None
    labels = np.zeros(image.shape[:2], dtype=np.uint8 if prompted else np.uint16)
    picture, described = image.copy(), []
    for number, prediction in enumerate(found):
        mask = prediction.mask
        labels[mask] = 255 if prompted else number + 1
        paint(picture, mask, number)
        described.append(
            {
                "predicted_iou": prediction.predicted_iou,
                "area": int(mask.sum()),
                "box": bounding_box(mask) if mask.any() else None,
                "segmentation": prediction.segmentation,
            }
        )
    picture = draw_prompts(picture, points, box)
    paths = [stem.with_name(f"{stem.name}-{kind}.png") for kind in ("mask", "overlay")]
    for path, content in zip(paths, (labels, picture), strict=True):
        with whole_file(path) as temporary:
            Image.fromarray(content).save(temporary, format="PNG")
    json_path = stem.with_name(f"{stem.name}.json")
    prompts = {
        "point": points.tolist() if points is not None else None,
        "box": box.tolist() if box is not None else None,
    }
    write_json(json_path, {"height": image.shape[0], "width": image.shape[1], **prompts, "masks": described})
    return [*paths, json_path]
