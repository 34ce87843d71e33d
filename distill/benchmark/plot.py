"""Latency against size or fidelity, and who is not beaten in both."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from embeddings_cache.system import whole_file

MARKERS = "os^DvPX*<>"


def draw_students(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Write `.png` and `.svg` beside `path`; nothing where no row has both numbers.

    Fidelity (mIoU of masks from boxes with the teacher's) goes on the x axis where it is known of two contenders at
    least, parameters otherwise. The Pareto front joins those that no other beats in both.
    """
    timed = [row for row in rows if row.get("median_ms") is not None]
    evaluated = [row for row in timed if row.get("miou_box") is not None]
    fidelity = len({row["name"] for row in evaluated}) > 1
    shown = evaluated if fidelity else [row for row in timed if row.get("parameters")]
    if not shown:
        return []
    across = [row["miou_box"] if fidelity else row["parameters"] / 1e6 for row in shown]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    points = [(x, row["median_ms"]) for x, row in zip(across, shown, strict=True)]
    front = pareto([(-x if fidelity else x, y) for x, y in points])
    best = list(zip(*(points[place] for place in front), strict=True))
    axes.plot(*best, color="0.6", linestyle="--", marker="o", markersize=14, fillstyle="none", label="Pareto front")
    backends = list(dict.fromkeys(row["backend"] for row in shown))
    for marker, backend in zip(cycle(MARKERS), backends, strict=False):
        own = [(point, row) for point, row in zip(points, shown, strict=True) if row["backend"] == backend]
        x, y = zip(*(point for point, _ in own), strict=True)
        spread = [
            [row["median_ms"] - row["p10_ms"] for _, row in own],
            [row["p90_ms"] - row["median_ms"] for _, row in own],
        ]
        axes.errorbar(x, y, yerr=spread, fmt=marker, capsize=2, label=backend)
    named = set()
    for (x, y), row in sorted(zip(points, shown, strict=True), key=lambda pair: -pair[0][1]):
        if row["name"] not in named:  # above its slowest backend
            axes.annotate(row["name"], (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
            named.add(row["name"])
    axes.set(xlabel="mIoU of masks from boxes with the teacher's" if fidelity else "parameters in millions")
    axes.set(ylabel="encoder, ms an image (median, p10 to p90)", yscale="log")
    if not fidelity and max(across) > 10 * min(across):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for each in written:
        with whole_file(each) as temporary:
            figure.savefig(temporary, format=each.suffix[1:], dpi=130)
    return written


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other is below of in one number and not above in the other, by the first number."""
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: points[place]):
        if not front or points[place][1] < points[front[-1]][1]:
            front.append(place)
    return front
