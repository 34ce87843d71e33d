"""The report as one HTML page that opens from disk: pictures and curves are inside, nothing is fetched."""

import base64
import io
import re
from importlib.resources import files
from typing import Any

import matplotlib
import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from distill.report.cases import Case

TEMPLATE = "page.html.jinja"
INK = "#010203"
"""Stands for the page's text colour in a plot; nothing else has it."""

COMPARISONS = {
    "student_teacher": "student with teacher",
    "student_truth": "student with truth",
    "teacher_truth": "teacher with truth",
}


def render_page(content: dict[str, Any], cases: list[Case]) -> str:
    """HTML of a report.

    Args:
        content: what `report.json` says.
        cases: pictures, best first.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "picture": data_uri,
        "duration": duration,
        "megabytes": lambda size: f"{size / 1e6:.1f} MB",
        "listed": lambda images: images if isinstance(images, str) else ", ".join(images),
    }
    template = environment.from_string((files("distill.report") / TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        content,
        cases=cases,
        settings_yaml=yaml.safe_dump(content["settings"], sort_keys=False, allow_unicode=True),
        comparisons=COMPARISONS,
        curves_svg=[(title, as_svg(figure)) for title, figure in draw_curves(content["curves"])],
    )


def draw_curves(curves: dict[str, list[list[float]]]) -> list[tuple[str, Figure]]:
    """Embedding error and mask fidelity over optimizer steps, as far as there are any."""
    plots = (
        ("Embedding MSE", "log", {"loss": "training", "val_mse": "held out"}),
        (
            "mIoU with the teacher's masks, held out",
            "linear",
            {"val_miou_box": "one box", "val_miou_point": "one point"},
        ),
    )
    drawn = []
    for title, scale, names in plots:
        present = {label: curves[name] for name, label in names.items() if curves.get(name)}
        if present:
            drawn.append((title, _plot(scale, present)))
    return drawn


def _plot(scale: str, lines: dict[str, list[list[float]]]) -> Figure:
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 11, "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.add_subplot(xlabel="optimizer step", yscale=scale)
        for (label, points), colour in zip(lines.items(), ("#3b82c4", "#e8833a"), strict=False):
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, "o-" if len(points) < 40 else "-", color=colour, label=label, markersize=3)
        if scale == "log":
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.tick_params(which="both", colors=INK)
        axes.xaxis.label.set_color(INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
        axes.grid(alpha=0.25, color=INK)
        axes.legend(frameon=False, labelcolor=INK)
        return figure


def as_svg(figure: Figure) -> Markup:
    """A figure as inline SVG without ground, in the page's text colour, as wide as there is room."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sam-distill"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return Markup(re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", svg, count=2))


def data_uri(picture: np.ndarray) -> str:
    """RGB uint8 (H, W, 3) as a `data:` address."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def duration(seconds: float) -> str:
    """`83.4` → `1 min 23 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
