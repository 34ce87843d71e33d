"""Masks and prompts drawn over a picture."""

from collections.abc import Iterable

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

COLOURS = (255 * matplotlib.colormaps["tab10"](range(10))[:, :3]).astype(np.uint8)


def overlay(image: np.ndarray, masks: Iterable[np.ndarray]) -> np.ndarray:
    """RGB uint8 (H, W, 3) with boolean masks (H, W) laid over it, each in its colour, the largest lowest."""
    picture = image.copy()
    for number, mask in sorted(enumerate(masks), key=lambda item: -item[1].sum()):
        paint(picture, mask, number)
    return picture


def paint(picture: np.ndarray, mask: np.ndarray, number: int) -> None:
    """Lay a boolean mask (H, W) over a picture, RGB uint8 (H, W, 3), in the n-th colour; the picture is changed."""
    values = np.arange(256)
    for channel, colour in enumerate(COLOURS[number % len(COLOURS)]):
        plane = picture[..., channel]
        np.copyto(plane, (0.4 * values + 0.6 * colour).astype(np.uint8)[plane], where=mask)


def draw_prompts(image: np.ndarray, points: np.ndarray | None = None, boxes: np.ndarray | None = None) -> np.ndarray:
    """RGB uint8 (H, W, 3) with points (N, 2) as discs and boxes (N, 4) as frames, the n-th in the n-th colour."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    stroke = max(2, round(max(picture.size) / 250))
    for number, box in enumerate(np.reshape(boxes, (-1, 4)) if boxes is not None else ()):
        draw.rectangle([float(side) for side in box], outline=_colour(number), width=stroke)
    for number, (x, y) in enumerate(np.reshape(points, (-1, 2)) if points is not None else ()):
        for radius, colour in ((3 * stroke, (255, 255, 255)), (2 * stroke, _colour(number))):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return np.asarray(picture)


def _colour(number: int) -> tuple[int, int, int]:
    red, green, blue = (int(channel) for channel in COLOURS[number % len(COLOURS)])
    return red, green, blue
