"""What `recipes/toy_teacher.py` learns from where it is given photographs: any that `data.images` takes, with masks."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image, ImageEnhance

from distill.reading import annotations_of, reading_of
from distill.recipe import Recipe, load_recipe
from distill.schema import EvaluateRecipe
from embeddings_cache.embed import Prepared, prepare
from embeddings_cache.images import (
    Account,
    Decoder,
    Sample,
    assign_sources,
    bounding_box,
    decode_masks,
    decode_rle,
    encode_rle,
    expand_sources,
    normalize,
    pick_sources,
    read_images,
    resize_longest_side,
    scene_count,
)
from embeddings_cache.system import progress_bar, stable_hash
from embeddings_cache.teacher import TOY_IMAGE_SIZE
from recipes.toy_losses import Example
from students import InputError

KEYS = {"images": "data.images", "annotations": "data.annotations", "test": "evaluate.data"}
"""What may be said on the command line, and the recipe's key that it goes by."""
KEPT_SIZE = TOY_IMAGE_SIZE * 3 // 2
"""Longest side of a photograph in memory, so that a crop of it still fills the toy's."""
HELD_OUT, MOST_HELD_OUT = 0.1, 200
"""Share of the photographs that are measured on where no others are named, and how many at most."""
THREADS = 2
MASKS = 12
"""Of a photograph, each time: they are many, and the decoder takes less time than the encoder."""
MIN_AREA = 25
"""Pixels of a mask at training size; smaller ones are not asked for."""
SMALLEST_CROP = 0.5
"""Of a side; half of the photographs are cropped, each side by itself."""
JITTER = 0.3
"""How far brightness, contrast and saturation are moved, each."""


@dataclass(frozen=True)
class Photograph:
    """RGB uint8 (h, w, 3), the longest side `KEPT_SIZE` at most; and masks of that size, which may overlap, as RLE."""

    key: str
    image: np.ndarray
    masks: list[dict]


def read_settings(settings: list[str]) -> Recipe:
    """A recipe with the images that `key=value` settings name.

    Raises:
        InputError: an unknown key, no `images`, or values that a recipe does not take.
    """
    arguments = ["recipe=quickstart"]  # of which nothing else counts here
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in KEYS:
            raise InputError(f"{setting!r} is not known: images=, annotations= and test= are, each with a value")
        arguments.append(f"{KEYS[key]}={value}")
    recipe = load_recipe(arguments)
    if not any(setting.startswith("images=") for setting in settings) or scene_count(recipe.data.images):
        raise InputError("images= names no photographs; generated scenes are what is learnt from without settings")
    return recipe


def load_photographs(recipe: Recipe, accelerator: Accelerator) -> tuple[list[Photograph], list[Prepared]]:
    """Photographs to learn from, and others to measure on: those of `evaluate.data`, else some of them, by hash.

    Raises:
        InputError: there are no such images, none has masks, or there are too few to hold any out.
    """
    skipped: list[str] = []
    account = Account(skipped=lambda key, why: skipped.append(f"{key}: {why}"))
    found: list[Photograph] = []
    unlabelled = 0
    with progress_bar(accelerator, "photographs", "images") as progress:
        for sample in _read(recipe, recipe.data.images, account):
            progress.update()
            try:
                photograph = shrink(sample)
            except ValueError as error:
                account.skipped(sample.key, str(error))
                continue
            unlabelled += not photograph.masks
            found += [photograph] if photograph.masks else []
    if not found:
        small = f"{MIN_AREA} px or more, the image being resized to {TOY_IMAGE_SIZE} px"
        why = f"{unlabelled} images without a mask of {small}" if unlabelled else skipped[0] if skipped else "no image"
        raise InputError(f"images={recipe.data.images}: none with masks to learn from: {why}")
    if recipe.evaluate.data is None:
        ranked = sorted(photograph.key for photograph in found)
        ranked.sort(key=lambda key: stable_hash(key, "toy"))
        held_out = set(ranked[: min(MOST_HELD_OUT, max(1, round(len(ranked) * HELD_OUT)))])
        found = [photograph for photograph in found if photograph.key not in held_out]
        if not found:
            raise InputError(f"images={recipe.data.images}: one photograph with masks; measuring takes another: test=")
        samples = _read(recipe, recipe.data.images, Account(), held_out)
    else:
        samples = _read(recipe, recipe.evaluate.data, Account())
    others = [
        image
        for sample in samples
        if any(True for _ in _masks(sample)) and isinstance(image := prepare(sample, TOY_IMAGE_SIZE, 95), Prepared)
    ]
    if not others:
        raise InputError(f"test={recipe.evaluate.data}: no image with masks to measure on")
    masks = sum(len(photograph.masks) for photograph in found)
    line = f"toy teacher: {len(found)} photographs with {masks:,} masks, {len(others)} others to measure on"
    line += f"; {unlabelled} without masks" if unlabelled else ""
    line += f"; {len(skipped)} skipped, first {skipped[0]}" if skipped else ""
    accelerator.print(f"{line}; a box that is filled whole has mIoU {filled_boxes(others):.3f}")
    return found, others


def _read(recipe: Recipe, images: str | list[str], account: Account, keys: set[str] | None = None) -> Iterator[Sample]:
    sources, _ = pick_sources(expand_sources(images), 1.0)
    decoder = Decoder(reading_of(recipe), annotations_of(recipe))
    yield from read_images(
        assign_sources(sources, 0, 1), lambda key: keys is None or key in keys, account, decoder, threads=THREADS
    )


def _masks(sample: Sample) -> Iterator[np.ndarray]:
    """Boolean (H, W), those that are not empty; none where the sample has no annotation."""
    return decode_masks(sample.annotation) if sample.annotation else iter(())


def shrink(sample: Sample) -> Photograph:
    """A sample as it is kept in memory; masks that are too small to learn from are left out.

    Raises:
        ValueError: the picture is too elongated.
    """
    size = min(KEPT_SIZE, max(sample.original_size))
    image = resize_longest_side(sample.image, size)
    masks = []
    for mask in _masks(sample):
        small = _resized(mask, image.shape[:2])
        masks += [encode_rle(small)] if small.sum() >= MIN_AREA * (size / TOY_IMAGE_SIZE) ** 2 else []
    return Photograph(sample.key, image, masks)


def augment(photograph: Photograph, size: int, rng: np.random.Generator) -> Example:
    """Cropped, mirrored and lit otherwise, with `MASKS` of its masks at most."""
    order = rng.permutation(len(photograph.masks))
    window: tuple[slice, ...] = (slice(None), slice(None))
    if rng.random() < 0.5:
        window = crop_window(decode_rle(photograph.masks[order[0]]), rng)
    picture = Image.fromarray(photograph.image[window])
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
    image = resize_longest_side(np.asarray(picture), size)
    mirrored = rng.integers(2)
    masks: list[np.ndarray] = []
    for number in order:
        mask = _resized(decode_rle(photograph.masks[number])[window], image.shape[:2])
        masks += [mask] if mask.sum() >= MIN_AREA else []
        if len(masks) == MASKS:
            break
    stack = np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), dtype=bool)
    if mirrored:
        image, stack = image[:, ::-1], stack[:, :, ::-1]
    padding = (0, size - image.shape[1], 0, size - image.shape[0])
    pixels = normalize(torch.from_numpy(image.copy()).permute(2, 0, 1))
    return F.pad(pixels, padding), F.pad(torch.from_numpy(stack.copy()), padding)


def crop_window(mask: np.ndarray, rng: np.random.Generator) -> tuple[slice, ...]:
    """Where to cut a picture whose mask (H, W) is not to be lost: some pixel of the mask lies within."""
    inside = np.argwhere(mask)
    pixel, window = inside[rng.integers(len(inside))], []
    for place, whole in zip(pixel, mask.shape, strict=True):
        side = max(1, int(whole * rng.uniform(SMALLEST_CROP, 1)))
        first = int(rng.integers(max(0, place - side + 1), min(place, whole - side) + 1))
        window.append(slice(first, first + side))
    return tuple(window)


def filled_boxes(images: list[Prepared]) -> float:
    """mIoU of a mask's bounding box, filled whole, with the mask: what a box is worth by itself, on the same masks."""
    ious = []
    for image in images:
        assert image.annotation is not None
        for mask in islice(decode_masks(image.annotation), EvaluateRecipe().masks_per_image):
            x0, y0, x1, y1 = map(int, bounding_box(mask))
            ious.append(float(mask.sum()) / ((x1 - x0) * (y1 - y0)))
    return fmean(ious)


def _resized(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The nearest of a boolean mask's pixels, (H, W) → `shape`."""
    size = (shape[1], shape[0])
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)).astype(bool)
