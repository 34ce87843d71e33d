"""Generated scenes with exact masks, in SA-1B's own layout: data for the quickstart and the tests.

Overlapping shapes of many kinds lie on a textured ground, painted back to front. A mask is a connected part of a shape
that is left visible: SAM's data engine drops small regions, so that SA-1B's masks are nearly all in one part
(arXiv:2304.02643, appendix B). Everything follows from the seed.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, label, shift, zoom

from embeddings_cache.images.annotations import bounding_box, center_point
from embeddings_cache.images.rle import encode_rle
from embeddings_cache.system import whole_file
from students import InputError

SCENES_PER_TAR = 64
GENERATION = 2
"""Counts up when the same seed gives other scenes, so that tars of older ones are not taken for these."""

MIN_SHARE = 1 / 400
"""Of the picture; a part smaller than this gets no mask."""

MIN_CONTRAST = 40
"""Of 255, in some channel: between the mean colour of a shape and of what it covers, so that it can be seen."""

SHADOW_MARGIN = 16
"""Pixels that a shadow reaches beyond its shape: its offset and its blur."""

Grid = tuple[np.ndarray, ...]
Window = tuple[slice, slice]


def scene_count(images: Any) -> int:
    """N where a recipe's images are `scenes:N`, 0 where they are anything else.

    Raises:
        InputError: N is not a positive number.
    """
    if not isinstance(images, str) or not images.startswith("scenes:"):
        return 0
    number = images.removeprefix("scenes:")
    if not number.isdecimal() or not int(number):
        raise InputError(f"data.images={images}: scenes:N takes a positive number")
    return int(number)


def write_scene_tars(
    directory: Path, count: int, longest_side: int, seed: int = 0, done: Callable[[int], object] = lambda scenes: None
) -> list[str]:
    """Write `count` scenes as SA-1B-style tars; tars that are there already are kept.

    Args:
        directory: of the tars; made if need be.
        count: of scenes.
        longest_side: in pixels.
        seed: scenes of another seed are other scenes.
        done: told how many scenes each tar added, for a progress bar.

    Returns:
        Paths of the tars, in order.
    """
    paths = []
    for first in range(0, count, SCENES_PER_TAR):
        numbers = range(first, min(first + SCENES_PER_TAR, count))
        path = (
            directory / f"scenes{GENERATION}_{longest_side}px_seed{seed}_{numbers.start:06d}-{numbers.stop - 1:06d}.tar"
        )
        if not path.exists():
            write_scene_tar(path, numbers, longest_side, seed)
        done(len(numbers))
        paths.append(str(path))
    return paths


def write_scene_tar(path: Path, numbers: range, longest_side: int, seed: int = 0) -> None:
    """Write the scenes with these numbers to one tar: `sa_N.jpg` and `sa_N.json` each."""
    with whole_file(path) as temporary, tarfile.open(temporary, "w") as tar:
        for number in numbers:
            image, masks = generate_scene(np.random.default_rng([seed, number]), longest_side)
            jpeg = io.BytesIO()
            Image.fromarray(image).save(jpeg, "JPEG", quality=95)
            _add(tar, f"sa_{number}.jpg", jpeg.getvalue())
            _add(tar, f"sa_{number}.json", json.dumps(sa1b_annotation(number, image, masks)).encode())


def sa1b_annotation(image_id: int, image: np.ndarray, masks: list[np.ndarray]) -> dict:
    """SA-1B's JSON for one image (https://github.com/facebookresearch/segment-anything#dataset)."""
    height, width = image.shape[:2]
    annotations = []
    for index, mask in enumerate(masks):
        x0, y0, x1, y1 = bounding_box(mask)
        annotations.append(
            {
                "id": image_id * 1000 + index,
                "segmentation": encode_rle(mask),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(mask.sum()),
                "predicted_iou": 1.0,
                "stability_score": 1.0,
                "crop_box": [0.0, 0.0, float(width), float(height)],
                "point_coords": [list(center_point(mask))],
            }
        )
    info = {"image_id": image_id, "width": width, "height": height, "file_name": f"sa_{image_id}.jpg"}
    return {"image": info, "annotations": annotations}


def generate_scene(rng: np.random.Generator, longest_side: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """One scene.

    Returns:
        RGB uint8 (H, W, 3) with max(H, W) = longest_side, and a boolean (H, W) mask a visible part.
    """
    short = int(longest_side * rng.uniform(0.65, 1.0))
    height, width = (short, longest_side) if rng.random() < 0.6 else (longest_side, short)
    grid: Grid = tuple(np.mgrid[:height, :width].astype(np.float32))

    canvas = _texture(rng, grid)
    owner = np.zeros((height, width), dtype=np.int32)
    sizes = np.sort(rng.uniform(0.08, 0.3, size=rng.integers(3, 9)))[::-1] * longest_side
    for number, size in enumerate(sizes, start=1):
        window, shape = _shape(rng, grid, float(size))
        if not shape.any():
            continue
        if rng.random() < 0.5:  # a soft shadow, so that contrast at a boundary is not the same all around
            shadow = gaussian_filter(shift(shape.astype(np.float32), rng.integers(-8, 9, 2), order=0), 3)
            canvas[window] *= 1 - 0.5 * shadow[..., None]
        canvas[window][shape] = _surface(rng, (grid[0][window], grid[1][window]), shape, canvas[window][shape])
        owner[window][shape] = number

    light = 1 + rng.uniform(-0.25, 0.25) * (grid[0] / height - 0.5) + rng.uniform(-0.25, 0.25) * (grid[1] / width - 0.5)
    canvas *= light[..., None]
    gaussian_filter(canvas, (rng.uniform(0, 0.8),) * 2 + (0,), output=canvas)
    canvas += rng.uniform(0, 8) * rng.standard_normal(canvas.shape, dtype=np.float32)
    masks = [part for part in _parts(owner) if part.mean() >= MIN_SHARE]
    return canvas.clip(0, 255).astype(np.uint8), masks


def _parts(owner: np.ndarray) -> Iterator[np.ndarray]:
    """The connected parts of each shape that is still to be seen."""
    for number in range(1, owner.max() + 1):
        labels, count = label(owner == number)
        yield from (labels == part for part in range(1, count + 1))


def _shape(rng: np.random.Generator, grid: Grid, radius: float) -> tuple[Window, np.ndarray]:
    """A shape of a random kind, place, rotation and elongation; its half-extent is about `radius` pixels.

    Returns:
        The part of the picture that holds it with a margin for its shadow, and its boolean mask there.
    """
    height, width = grid[0].shape
    y0, x0 = rng.uniform(0, height), rng.uniform(0, width)
    turn, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 2.2)
    reach = 1.5 * radius * stretch**0.5 + SHADOW_MARGIN
    window = (slice(max(0, int(y0 - reach)), int(y0 + reach)), slice(max(0, int(x0 - reach)), int(x0 + reach)))
    y, x = grid[0][window] - np.float32(y0), grid[1][window] - np.float32(x0)
    u = (x * np.cos(turn) + y * np.sin(turn)) / (radius * stretch**0.5)
    v = (y * np.cos(turn) - x * np.sin(turn)) / (radius / stretch**0.5)
    return window, _one_of(
        rng,
        lambda: np.abs(u) ** (p := rng.uniform(0.7, 8)) + np.abs(v) ** p < 1,  # star, diamond, ellipse, box
        lambda: np.hypot(u, v) < _wave(rng, np.arctan2(v, u)),  # blob
        lambda: np.hypot(u, v) < _polygon(rng, np.arctan2(v, u)),  # regular polygon
        lambda: np.abs(np.hypot(u, v) - 0.8) < rng.uniform(0.2, 0.3),  # ring
        lambda: (np.abs(v - 0.5 * np.sin(3 * u)) < 0.3) & (np.abs(u) < 1.2),  # ribbon
    )


def _one_of(rng: np.random.Generator, *kinds: Callable[[], np.ndarray]) -> np.ndarray:
    return kinds[rng.integers(len(kinds))]()


def _wave(rng: np.random.Generator, angle: np.ndarray) -> np.ndarray:
    waves = [rng.uniform(-0.18, 0.18) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 6)]
    return 0.9 + np.sum(waves, axis=0)


def _polygon(rng: np.random.Generator, angle: np.ndarray) -> np.ndarray:
    step = 2 * np.pi / rng.integers(3, 8)
    return np.cos(step / 2) / np.cos(angle % step - step / 2)


def _surface(rng: np.random.Generator, grid: Grid, shape: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """The colours (N, 3) of a shape (H, W) of N pixels, different enough from those that it covers."""
    while True:
        colours = _texture(rng, grid)[shape]
        if np.abs(colours.mean(0) - covered.mean(0)).max() >= MIN_CONTRAST:
            return colours


def _texture(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    """A coloured surface, float32 (H, W, 3): two colours mixed by a random pattern."""
    y, x = grid
    first, second = rng.uniform(10, 245, (2, 3))
    second = first + (second - first) * rng.uniform(0.1, 0.7)
    turn, period = rng.uniform(0, np.pi), rng.uniform(4, 24)
    along = x * np.cos(turn) + y * np.sin(turn)
    across = y * np.cos(turn) - x * np.sin(turn)
    mix = _one_of(
        rng,
        lambda: np.zeros_like(x),  # flat
        lambda: (along - along.min()) / (np.ptp(along) + 1),  # gradient
        lambda: 0.5 + 0.5 * np.sin(2 * np.pi * along / period),  # stripes
        lambda: ((along // period + across // period) % 2).astype(np.float32),  # checks
        lambda: _smooth_noise(rng, x.shape),  # clouds
        lambda: (rng.random(x.shape, dtype=np.float32) < 0.2).astype(np.float32),  # speckle
    )[..., None]
    return (first * (1 - mix) + second * mix).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    cells = rng.integers(4, 13)
    noise = zoom(rng.random((cells, cells)), (shape[0] / cells, shape[1] / cells), order=3)
    return noise[: shape[0], : shape[1]].clip(0, 1)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
