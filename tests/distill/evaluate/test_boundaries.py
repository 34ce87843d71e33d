import os
from math import hypot
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment
from skimage.morphology import thin

from distill.evaluate.boundaries import (
    MAX_DISTANCE,
    Counts,
    count_boundaries,
    summarize_counts,
    suppress_non_maxima,
    thresholds_of,
)
from distill.evaluate.edges import read_boundaries

BENCH = os.environ.get("BSDS_BENCH", "")
"""Folder of the benchmark's own test: `png/`, `groundTruth/`, and `eval_bdry*.txt`, what the official code prints."""


def drawing(generator: np.random.Generator, shape: tuple[int, int], strokes: int) -> np.ndarray:
    """Some wandering lines, one pixel wide."""
    drawn = np.zeros(shape, bool)
    for _ in range(strokes):
        y, x = generator.integers(0, shape[0]), generator.integers(0, shape[1])
        angle = generator.uniform(0, 2 * np.pi)
        for _ in range(40):
            angle += generator.normal(0, 0.3)
            y, x = y + np.sin(angle), x + np.cos(angle)
            if 0 <= y < shape[0] and 0 <= x < shape[1]:
                drawn[int(y), int(x)] = True
    return thin(drawn)


def cheapest(drawn: np.ndarray, truth: np.ndarray, distance: float) -> np.ndarray:
    """Which of the drawn pixels the assignment of least cost matches: a pair costs its distance, a pixel without a
    partner a hundred times the largest. By a dense solver."""
    a, b = np.argwhere(drawn), np.argwhere(truth)
    lengths = np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1))
    outlier = 100 * distance
    cost = np.full((len(a) + len(b), len(a) + len(b)), 1e9)
    cost[: len(a), : len(b)] = np.where(lengths <= distance, lengths, 1e9)
    cost[: len(a), len(b) :][np.diag_indices(len(a))] = outlier
    cost[len(a) :, : len(b)][np.diag_indices(len(b))] = outlier
    cost[len(a) :, len(b) :] = 0
    rows, columns = linear_sum_assignment(cost)
    matched = np.zeros(len(a), bool)
    matched[rows[(rows < len(a)) & (columns < len(b))]] = True
    return matched


@pytest.mark.parametrize("seed", range(4))
def test_as_many_are_matched_as_in_the_assignment_of_least_cost(seed: int) -> None:
    generator = np.random.default_rng(seed)
    shape = (150, 260)  # a distance of 2.25 px
    truths = [drawing(generator, shape, 6) for _ in range(3)]
    wobbled = np.zeros(shape, bool)
    for truth in truths[:2]:
        places = np.argwhere(truth) + generator.integers(-2, 3, (truth.sum(), 2))
        places = places[(places >= 0).all(axis=1) & (places < shape).all(axis=1)]
        wobbled[tuple(places.T)] = True
    drawn = thin(wobbled | drawing(generator, shape, 3))
    counts = count_boundaries(drawn * 0.5, truths, np.array([0.4, 0.6]))
    expected = [cheapest(drawn, truth, MAX_DISTANCE * hypot(*shape)) for truth in truths]
    assert counts.truth.tolist() == [sum(truth.sum() for truth in truths)] * 2
    assert counts.found.tolist() == [sum(matched.sum() for matched in expected), 0]
    assert counts.drawn.tolist() == [drawn.sum(), 0]
    right = np.logical_or.reduce(expected).sum()
    assert abs(counts.right[0] - right) <= 0.02 * drawn.sum()
    assert 0.2 < counts.right[0] / drawn.sum() < 0.95


def test_a_boundary_is_found_once() -> None:
    truth = np.zeros((300, 400), bool)  # a distance of 3.75 px
    truth[150, 50:350] = True
    twice = np.zeros((300, 400))
    twice[149, 50:350], twice[152, 50:350] = 0.9, 0.9
    far = np.zeros((300, 400))
    far[154, 50:350] = 0.9
    for edges, right, drawn in ((twice, 300, 600), (far, 0, 300), (truth.astype(float), 300, 300)):
        counts = count_boundaries(edges, [truth], np.array([0.5]))
        assert (counts.right[0], counts.found[0], counts.drawn[0]) == (right, right, drawn)


def test_a_chain_of_pixels_makes_way_for_one_that_has_no_other_partner() -> None:
    truth, edges = np.zeros((9, 400), bool), np.zeros((9, 400))  # a distance of 3 px
    truth[4, [10, 13, 16]] = True
    edges[4, [13, 16, 19]] = 1.0  # the nearest pairs leave 19 without one, and 10 as well
    counts = count_boundaries(edges, [truth], np.array([0.5]))
    assert counts.found[0] == counts.right[0] == 3


def test_scores_by_hand() -> None:
    first = Counts(*np.array([[10, 10, 10], [10, 8, 0], [40, 10, 0], [20, 8, 0]]))
    second = Counts(*np.array([[10, 10, 10], [6, 2, 0], [10, 2, 0], [8, 2, 0]]))
    numbers = summarize_counts([first, second], thresholds_of(3))
    # Together: recall 16/20, 10/20, 0; precision 28/50, 10/12, 0. Between the first two F is largest.
    share = np.linspace(0, 1, 101)
    recall, precision = 0.8 + share * (0.5 - 0.8), 0.56 + share * (10 / 12 - 0.56)
    f = 2 * recall * precision / (recall + precision)
    assert numbers["ODS"] == pytest.approx(f.max())
    assert numbers["ODS_threshold"] == pytest.approx(0.25 + 0.25 * share[f.argmax()])
    # The first is best at its second threshold, 8/10 and 8/10, the second at its first, 6/10 and 8/10.
    assert numbers["OIS"] == pytest.approx(2 * (14 / 20) * (16 / 20) / (14 / 20 + 16 / 20))
    reached = np.interp(np.arange(81) / 100, [0, 0.5, 0.8], [0, 10 / 12, 0.56])
    assert numbers["AP"] == pytest.approx(reached.sum() / 100)
    assert numbers["R50"] == pytest.approx(0.8)  # precision is never as low


def test_recall_at_half_precision_is_interpolated() -> None:
    counts = Counts(*np.array([[10, 10], [8, 4], [20, 5], [8, 3]]))
    # Recall 0.8 and 0.4, precision 0.4 and 0.6: half way.
    assert summarize_counts([counts], thresholds_of(2))["R50"] == pytest.approx(0.6)


def test_nothing_drawn_and_nothing_to_find_are_zeros() -> None:
    counts = count_boundaries(np.zeros((40, 40)), [np.zeros((40, 40), bool)], thresholds_of(5))
    numbers = summarize_counts([counts], thresholds_of(5))
    assert [numbers[name] for name in ("ODS", "OIS", "AP", "R50")] == [0, 0, 0, 0]


def test_edge_nms_leaves_the_crest() -> None:
    rows, columns = np.mgrid[:80, :120]
    distance = (columns - 60) * np.cos(0.4) + (rows - 40) * np.sin(0.4)
    ridge = np.exp(-((distance / 3) ** 2))
    kept = suppress_non_maxima(ridge)
    inside = kept[10:-10, 10:-10] > 0.2
    assert np.abs(distance[10:-10, 10:-10][inside]).max() < 1
    assert inside.any(axis=1).all()
    assert (kept[kept > 0] <= ridge[kept > 0]).all()
    assert kept[0].max() == kept[-1].max() == 0  # five pixels to the border fade out
    assert kept[2].max() == pytest.approx(0.4 * ridge[2][kept[2].argmax()])


def test_edge_nms_is_that_of_structured_edges() -> None:
    toolbox = pytest.importorskip("pyEdgeEval._lib", reason="pip install pyedgeeval").nms
    from pyEdgeEval.preprocess.nms.toolbox import conv_tri, grad2

    edges = gaussian_filter(np.random.default_rng(0).random((90, 140)), 2)
    edges = (edges - edges.min()) / np.ptp(edges)
    across, _ = grad2(conv_tri(edges, 4))
    xx, _ = grad2(across)
    xy, yy = grad2(grad2(conv_tri(edges, 4))[1])
    angle = np.mod(np.arctan(yy * np.sign(-xy) / (xx + 1e-5)), np.pi)
    expected, found = toolbox(edges, angle, r=1, s=5, m=1.01), suppress_non_maxima(edges)
    assert np.mean((expected > 0) == (found > 0)) > 0.99
    both = (expected > 0) & (found > 0)
    assert np.allclose(expected[both], found[both])


@pytest.mark.skipif(not BENCH, reason="BSDS_BENCH names no folder of the benchmark's own test")
def test_the_official_codes_own_test() -> None:
    thresholds, images = thresholds_of(5), []
    for path in sorted(Path(BENCH).glob("png/*.png")):
        edges = np.asarray(Image.open(path)) / 255
        images.append(
            count_boundaries(edges, read_boundaries(Path(BENCH, "groundTruth", f"{path.stem}.mat")), thresholds)
        )
    numbers = summarize_counts(images, thresholds)
    printed = np.loadtxt(Path(BENCH, "eval_bdry.txt"), max_rows=1)
    assert numbers["ODS"] == pytest.approx(printed[3], abs=0.003)
    assert numbers["OIS"] == pytest.approx(printed[6], abs=0.003)
    assert numbers["AP"] == pytest.approx(printed[7], abs=0.003)
    each = np.loadtxt(Path(BENCH, "eval_bdry_thr.txt"))
    total = Counts(*(sum(vars(image)[name] for image in images) for name in ("truth", "found", "drawn", "right")))
    assert np.abs(total.recall - each[:, 1]).max() < 0.005
    assert np.abs(total.precision - each[:, 2]).max() < 0.005


def test_soft_maps_score_as_by_the_official_codes_own_matching() -> None:
    evaluate = pytest.importorskip(
        "pyEdgeEval.common.binary_label.evaluate_boundaries", reason="pip install pyedgeeval"
    ).evaluate_boundaries_threshold_multiple_gts
    generator, thresholds = np.random.default_rng(0), thresholds_of(9)
    ours, theirs = [], []
    for _ in range(4):
        truths = [drawing(generator, (200, 300), 8) for _ in range(3)]
        soft = gaussian_filter(np.mean(truths, axis=0) + 0.2 * drawing(generator, (200, 300), 20), 1)
        edges = suppress_non_maxima(soft / soft.max())
        ours.append(count_boundaries(edges, truths, thresholds))
        found, truth, right, drawn = evaluate(thresholds, edges, np.array(truths))
        theirs.append(Counts(truth=truth, found=found, drawn=drawn, right=right))
    numbers, expected = summarize_counts(ours, thresholds), summarize_counts(theirs, thresholds)
    for name in ("ODS", "OIS", "AP", "R50"):
        assert numbers[name] == pytest.approx(expected[name], abs=0.004)  # which has chance in it
