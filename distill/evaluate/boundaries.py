"""How well a soft edge map meets the boundaries that people have drawn: the benchmark of BSDS500.

As its code, `boundaryBench` (Martin, Fowlkes and Malik, PAMI 2004; Arbelaez, Maire, Fowlkes and Malik, PAMI 2011,
section 3.1), defines it: at each threshold the map is thinned, and matched one to one with each person's boundaries
within a distance. Recall counts what is matched of every person's, precision what is matched of the map by anybody's.

That code looks for the assignment of least cost, in which a pair costs its distance and a pixel without a partner a
hundred times the largest: so for the most pairs, and among these for the nearest. Here as many are found by augmenting
paths (Kuhn, 1955), from pairs that were nearest, and then made nearer where that is possible one by one. Recall is the
same; precision, which depends on which of several pixels somebody was matched with, differs by some thousandths at most
thresholds. It takes a fiftieth of the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, hypot

import numpy as np
from numba import njit
from scipy.ndimage import convolve1d, map_coordinates
from skimage.morphology import thin

MAX_DISTANCE = 0.0075
"""Of the image's diagonal."""
RECALLS = np.arange(0, 1, 0.01)
"""At which precision is read for the average."""


@dataclass(frozen=True)
class Counts:
    """Pixels of an image at each of T thresholds, integers (T,); of several images, their sums.

    Attributes:
        truth: of all persons' boundaries.
        found: those of them that the map's were matched with.
        drawn: of the thinned map.
        right: those of them that somebody's were matched with.
    """

    truth: np.ndarray
    found: np.ndarray
    drawn: np.ndarray
    right: np.ndarray

    @property
    def recall(self) -> np.ndarray:
        """(T,); 0 where nothing is to be found."""
        return self.found / np.maximum(self.truth, 1)

    @property
    def precision(self) -> np.ndarray:
        """(T,); 0 where nothing is drawn."""
        return self.right / np.maximum(self.drawn, 1)

    @property
    def f(self) -> np.ndarray:
        """(T,); harmonic mean of the two."""
        return f_measure(self.precision, self.recall)


def thresholds_of(count: int) -> np.ndarray:
    """So many thresholds, evenly between 0 and 1 and without these."""
    return np.linspace(1 / (count + 1), 1 - 1 / (count + 1), count)


def count_boundaries(edges: np.ndarray, truths: Sequence[np.ndarray], thresholds: np.ndarray) -> Counts:
    """Match a soft edge map with everybody's boundaries.

    Args:
        edges: (H, W) in [0, 1].
        truths: boolean (H, W), one a person.
        thresholds: (T,); a pixel is an edge where it is not below.
    """
    distance = MAX_DISTANCE * hypot(*edges.shape)
    margin = ceil(distance)
    steps = _steps(distance)
    numbered = [(np.argwhere(truth), _number(truth, margin)) for truth in truths]
    counts = np.zeros((4, len(thresholds)), dtype=np.int64)
    for place, threshold in enumerate(thresholds):
        drawn = thin(edges >= max(np.finfo(float).eps, threshold))
        pixels, numbers = np.argwhere(drawn), _number(drawn, margin)
        right = np.zeros(len(pixels), dtype=bool)
        for boundary, boundary_numbers in numbered:
            matched = _match(pixels, numbers, boundary, boundary_numbers, steps, np.hypot(*steps.T), margin)
            right |= matched
            counts[:2, place] += np.array([len(boundary), np.count_nonzero(matched)])
        counts[2:, place] = (len(pixels), np.count_nonzero(right))
    return Counts(*counts)


def summarize_counts(images: Sequence[Counts], thresholds: np.ndarray) -> dict[str, float]:
    """ODS, OIS, AP and R50 of a set of images, as `collect_eval_bdry` computes them.

    ODS is the F-measure at the best threshold for all images, between two of them by interpolation; OIS the one where
    each image has its own; AP the precision's mean over recalls of 0, 0.01, ... 0.99, 0 where the curve does not
    reach; R50 the recall at a precision of one half.
    """
    total = Counts(*(sum(getattr(image, name) for image in images) for name in ("truth", "found", "drawn", "right")))
    best = [int(np.argmax(image.f)) for image in images]
    each = Counts(
        *(
            np.array([sum(getattr(image, name)[place] for image, place in zip(images, best, strict=True))])
            for name in ("truth", "found", "drawn", "right")
        )
    )
    recall, precision = total.recall, total.precision
    share = np.linspace(0, 1, 101)[:, None]
    blends = [a[:-1] * (1 - share) + a[1:] * share for a in (recall, precision, thresholds)]
    f = f_measure(blends[1], blends[0]) if len(thresholds) > 1 else total.f
    at = np.unravel_index(np.argmax(f), f.shape)
    distinct, first = np.unique(recall, return_index=True)
    average = np.interp(RECALLS, distinct, precision[first], left=0, right=0).mean() if len(distinct) > 1 else 0.0
    return {
        "ODS": float(f[at]),
        "OIS": float(each.f[0]),
        "AP": float(average),
        "R50": _recall_at_half(recall, precision),
        "ODS_threshold": float(blends[2][at] if len(thresholds) > 1 else thresholds[0]),
    }


def f_measure(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Harmonic mean; 0 where both are."""
    return 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)


def suppress_non_maxima(edges: np.ndarray) -> np.ndarray:
    """Edge NMS: keep the crest of each ridge of an edge map.

    As the toolbox of Structured Edges does it, with which the field thins its maps (Dollár and Zitnick, PAMI 2015,
    section 3.4, after Canny, PAMI 1986): across the edge, by orientations from second derivatives of the smoothed map,
    a pixel goes where one of its two neighbours is more than 1.01 times as strong; five pixels to the image's border
    fade out.

    Args:
        edges: (H, W).

    Returns:
        The same with zeros, float64 (H, W).
    """
    kernel = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 25
    smooth = convolve1d(convolve1d(edges.astype(float), kernel, axis=0), kernel, axis=1)
    down, right = np.gradient(smooth)
    across = np.gradient(right, axis=1)
    twisted, along = np.gradient(down, axis=1), np.gradient(down, axis=0)
    angle = np.arctan(along * np.sign(-twisted) / (across + 1e-5))
    rows, columns = np.nonzero(edges)
    step = np.array([np.sin(angle[rows, columns]), np.cos(angle[rows, columns])])
    strongest = np.maximum(
        *(
            map_coordinates(edges.astype(float), (rows, columns) + sign * step, order=1, mode="nearest")
            for sign in (1, -1)
        )
    )
    kept = np.zeros(edges.shape)
    crest = 1.01 * edges[rows, columns] >= strongest
    kept[rows[crest], columns[crest]] = edges[rows[crest], columns[crest]]
    for axis, length in enumerate(edges.shape):
        fade = np.minimum(1, np.minimum(np.arange(length), np.arange(length)[::-1]) / min(5, length // 2))
        kept *= np.expand_dims(fade, 1 - axis)
    return kept


def _recall_at_half(recall: np.ndarray, precision: np.ndarray) -> float:
    """The largest recall at which precision is ½, by interpolation along the curve; 0 where it never is."""
    enough = precision >= 0.5
    if not enough.any():
        return 0.0
    reached = float(recall[enough].max())
    for place in np.flatnonzero(enough[:-1] != enough[1:]):
        share = (0.5 - precision[place]) / (precision[place + 1] - precision[place])
        reached = max(reached, float(recall[place] + share * (recall[place + 1] - recall[place])))
    return reached


def _steps(distance: float) -> np.ndarray:
    """(K, 2) offsets (rows, columns) no longer than a distance, the shortest first."""
    reach = np.arange(-ceil(distance), ceil(distance) + 1)
    offsets = np.stack(np.meshgrid(reach, reach, indexing="ij"), axis=-1).reshape(-1, 2)
    lengths = np.hypot(*offsets.T)
    near = np.argsort(lengths, kind="stable")
    return offsets[near][lengths[near] <= distance]


def _number(drawn: np.ndarray, margin: int) -> np.ndarray:
    """Numbers of the pixels of a line drawing where they are, −1 elsewhere and in a margin around: int32."""
    numbers = np.full(drawn.shape, -1, dtype=np.int32)
    numbers[drawn] = np.arange(np.count_nonzero(drawn))
    return np.pad(numbers, margin, constant_values=-1)


@njit(nogil=True)
def _match(
    pixels: np.ndarray,
    numbers: np.ndarray,
    others: np.ndarray,
    other_numbers: np.ndarray,
    steps: np.ndarray,
    lengths: np.ndarray,
    margin: int,
) -> np.ndarray:
    """Match pixels (N, 2) one to one with others (M, 2) no farther than the steps (K, 2) reach, as many as possible.

    Returns:
        Boolean (N,), which of the pixels have a partner.
    """
    partner, owner = np.full(len(pixels), -1, np.int32), np.full(len(others), -1, np.int32)
    length = np.zeros(len(others))  # between the two of a pair
    for step in range(len(steps)):
        for pixel in range(len(pixels)):
            if partner[pixel] < 0:
                other = other_numbers[
                    pixels[pixel, 0] + margin + steps[step, 0], pixels[pixel, 1] + margin + steps[step, 1]
                ]
                if other >= 0 and owner[other] < 0:
                    partner[pixel], owner[other], length[other] = other, pixel, lengths[step]
    _augment(partner, owner, length, numbers, others, steps, lengths, margin)
    _draw_nearer(partner, owner, length, pixels, other_numbers, steps, lengths, margin)
    return partner >= 0


@njit(nogil=True)
def _augment(
    partner: np.ndarray,
    owner: np.ndarray,
    length: np.ndarray,
    numbers: np.ndarray,
    others: np.ndarray,
    steps: np.ndarray,
    lengths: np.ndarray,
    margin: int,
) -> None:
    """Pair every other that can be, by a path along which each takes the pixel of the next, to a pixel that is free: of
    the paths of fewest steps one that adds least to the lengths."""
    reached_by, reached_for = np.full(len(partner), -1, np.int32), np.full(len(partner), -1, np.int32)
    in_layer, dead = np.zeros(len(partner), np.int32), np.zeros(len(partner), np.bool_)
    added, last_length = np.zeros(len(partner)), np.zeros(len(partner))
    reached, layer, following = (
        np.empty(len(partner), np.int32),
        np.empty(len(owner), np.int32),
        np.empty(len(owner), np.int32),
    )
    for start in range(len(owner)):
        if owner[start] >= 0:
            continue
        layer[0], layer_size, depth, count, free = start, 1, 0, 0, -1
        while layer_size > 0 and free < 0:
            depth, first = depth + 1, count
            for place in range(layer_size):
                other = layer[place]
                before = 0.0 if other == start else added[owner[other]] - length[other]
                for step in range(len(steps)):
                    pixel = numbers[
                        others[other, 0] + margin + steps[step, 0], others[other, 1] + margin + steps[step, 1]
                    ]
                    if pixel < 0 or dead[pixel]:
                        continue
                    new = reached_for[pixel] != start
                    if new:
                        reached[count], reached_for[pixel], in_layer[pixel] = pixel, start, depth
                        count += 1
                    if new or (in_layer[pixel] == depth and before + lengths[step] < added[pixel]):
                        added[pixel], reached_by[pixel], last_length[pixel] = (
                            before + lengths[step],
                            other,
                            lengths[step],
                        )
            layer_size = 0
            for place in range(first, count):
                pixel = reached[place]
                if partner[pixel] >= 0:
                    following[layer_size] = partner[pixel]
                    layer_size += 1
                elif free < 0 or added[pixel] < added[free]:
                    free = pixel
            layer, following = following, layer
        if free < 0:
            for place in range(count):
                dead[reached[place]] = True  # from there no path leads on, and none ever will
        while free >= 0:
            other = reached_by[free]
            given_up = owner[other]
            partner[free], owner[other], length[other] = other, free, last_length[free]
            free = given_up


@njit(nogil=True)
def _draw_nearer(
    partner: np.ndarray,
    owner: np.ndarray,
    length: np.ndarray,
    pixels: np.ndarray,
    other_numbers: np.ndarray,
    steps: np.ndarray,
    lengths: np.ndarray,
    margin: int,
) -> None:
    """Let a pixel without a partner take the place of one that is farther from its own, as often as that goes."""
    for start in range(len(partner)):
        pixel = start
        while pixel >= 0 and partner[pixel] < 0:
            best, nearest, gain = -1, 0.0, 1e-9
            for step in range(len(steps)):
                other = other_numbers[
                    pixels[pixel, 0] + margin + steps[step, 0], pixels[pixel, 1] + margin + steps[step, 1]
                ]
                if other >= 0 and owner[other] >= 0 and length[other] - lengths[step] > gain:
                    best, nearest, gain = other, lengths[step], length[other] - lengths[step]
            if best < 0:
                break
            put_out = owner[best]
            partner[pixel], owner[best], length[best] = best, pixel, nearest
            partner[put_out] = -1
            pixel = put_out
