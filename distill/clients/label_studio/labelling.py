"""A labelling configuration and an annotator's clicks, as a picture, a prompt, and the tag that the answer is for."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from errors import Refused

MOST_REGIONS = 1000
"""Clicks and rectangles of one object."""


@dataclass(frozen=True)
class ImageTag:
    """`<Image>`: its name, and its `value` or `valueList`, which says where in a task's data the picture is."""

    name: str
    value: str
    listed: bool


@dataclass(frozen=True)
class BrushTag:
    """`<BrushLabels>`: its name, the images that it is for, and for the value and alias of each of its labels what a
    result calls that label; none where the labels come with the task."""

    name: str
    images: frozenset[str]
    labels: dict[str, str]


@dataclass(frozen=True)
class Labelling:
    """The tags of a configuration that matter here."""

    images: dict[str, ImageTag]
    brushes: tuple[BrushTag, ...]


@dataclass(frozen=True)
class Prompt:
    """One object as an annotator pointed at it.

    `points` are x and y, `box` is x, y, width, height and clockwise degrees about its first corner; all but the
    degrees in percent of the upright picture. `size` is the picture's width and height, where Label Studio says so.
    """

    image: ImageTag
    item_index: int | None
    size: tuple[int, int] | None
    points: list[tuple[float, float]]
    labels: list[int]
    box: tuple[float, float, float, float, float] | None
    brush: BrushTag
    label: str

    def in_pixels(self, width: int, height: int) -> tuple[list[tuple[float, float]], list[float] | None]:
        """Points, and the upright box x0, y0, x1, y1 around a perhaps turned one, within a picture of that size."""
        points = [_within(x * width / 100, y * height / 100, width, height) for x, y in self.points]
        if self.box is None:
            return points, None
        x, y, wide, high = (part * side / 100 for part, side in zip(self.box[:4], (width, height) * 2, strict=True))
        turned = math.radians(self.box[4])
        corners = [
            _within(
                x + right * math.cos(turned) - down * math.sin(turned),
                y + right * math.sin(turned) + down * math.cos(turned),
                width,
                height,
            )
            for right in (0, wide)
            for down in (0, high)
        ]
        columns, rows = zip(*corners, strict=True)
        return points, [min(columns), min(rows), max(columns), max(rows)]


def read_config(xml: Any) -> Labelling:
    """The image and brush tags of a labelling configuration, however their names are capitalised.

    Raises:
        Refused: it is no XML, or declares entities.
    """
    if not isinstance(xml, str) or re.search(r"<!\s*(doctype|entity)", xml, re.IGNORECASE):
        raise Refused("label_config is no labelling configuration")
    try:
        tags = list(ElementTree.fromstring(xml.strip()).iter())
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise Refused(f"label_config is no XML: {error}") from error
    images, brushes = {}, []
    for tag in tags:
        kind, name = tag.tag.lower(), tag.get("name", "")
        if kind == "image":
            listed = tag.get("valueList")
            images[name] = ImageTag(name, listed or tag.get("value") or "", listed is not None)
        elif kind == "brushlabels":
            labels: dict[str, str] = {}
            for label in (child for child in tag.iter() if child.tag.lower() == "label"):
                value = label.get("value") or ""
                called = label.get("alias") or value
                labels |= {value: called, called: called}
            brushes.append(BrushTag(name, frozenset(re.split(r"\s*,\s*", tag.get("toName", "").strip())), labels))
    return Labelling(images, tuple(brushes))


def read_prompt(regions: Any, labelling: Labelling) -> Prompt:
    """What the regions of a context ask for: keypoints, and the last rectangle, on the image of the last region.

    Raises:
        Refused: they are malformed, or the configuration has no brush for what they point at.
    """
    if not isinstance(regions, list) or not all(isinstance(each, dict) for each in regions):
        raise Refused("context.result is no list of regions")
    if len(regions) > MOST_REGIONS:
        raise Refused(f"{len(regions)} regions are more than {MOST_REGIONS}")
    meant = [(each, kind) for each in regions if (kind := _kind(each))]
    if not meant:
        raise Refused("only keypoints and rectangles are prompts, and there are none")
    last = meant[-1][0]
    image = labelling.images.get(str(last.get("to_name")))
    if image is None:
        raise Refused(f"the labelling configuration has no Image named {last.get('to_name')!r}")
    place = last.get("to_name"), last.get("item_index")
    meant = [(each, kind) for each, kind in meant if (each.get("to_name"), each.get("item_index")) == place]
    if any(each.get("image_rotation") for each, _ in meant):
        raise Refused("the picture is shown turned: brush regions cannot follow that")
    points, labels, box = [], [], None
    for region, kind in meant:
        value = region["value"]
        at = _number(value, "x"), _number(value, "y")
        if kind == "keypoint":
            points.append(at)
            labels.append(int(bool(region.get("is_positive", True))))
        else:
            turned = _number(value, "rotation") if "rotation" in value else 0.0
            box = *at, _number(value, "width"), _number(value, "height"), turned
    brush, label = _brush(labelling.brushes, image.name, _labels([each for each, _ in meant]))
    wide, high, index = (last.get(key) for key in ("original_width", "original_height", "item_index"))
    return Prompt(
        image,
        index if isinstance(index, int) else None,
        (wide, high) if isinstance(wide, int) and isinstance(high, int) else None,
        points,
        labels,
        box,
        brush,
        label,
    )


def picture_of(image: ImageTag, data: Any, index: int | None) -> str:
    """Where the picture of a task is, as its data says: a URL, or a path on Label Studio's host.

    Raises:
        Refused: the data has none.
    """

    def look_up(name: str) -> Any:
        found = data
        for key in re.findall(r"\w+", name):
            if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            else:
                found = found.get(key) if isinstance(found, dict) else None
        return found

    variable = r"\$[\w.\[\]]+"
    found: Any = image.value
    if re.fullmatch(variable, image.value):
        found = look_up(image.value)
    elif not image.listed:
        found = re.sub(variable, lambda match: str(look_up(match[0]) or ""), image.value)
    if isinstance(found, list):
        found = found[index or 0] if 0 <= (index or 0) < len(found) else None
    if not isinstance(found, str) or not found:
        raise Refused(f"the task's data has no picture for {image.value!r}")
    return found


def _kind(region: dict[str, Any]) -> str | None:
    """`keypoint` or `rectangle`; None for what is no prompt, such as a relation between regions."""
    said = str(region.get("type")).lower()
    kind = next((kind for kind in ("keypoint", "rectangle") if said.startswith(kind)), None)
    if kind and not isinstance(region.get("value"), dict):
        raise Refused("a region has no value")
    return kind


def _number(value: dict[str, Any], key: str) -> float:
    number = value.get(key)
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < 1e6:
        raise Refused(f"a region's {key} is no number that makes sense: {str(number)[:40]}")
    return float(number)


def _within(x: float, y: float, width: int, height: int) -> tuple[float, float]:
    return min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height))


def _labels(regions: list[dict[str, Any]]) -> Sequence[str]:
    """The labels that the last of the regions carries, in whichever field its type has them."""
    for region in reversed(regions):
        for key in (str(region.get("type")).lower(), "labels"):
            found = region["value"].get(key)
            if isinstance(found, list) and found:
                return [str(each) for each in found]
    return []


def _brush(brushes: Sequence[BrushTag], image: str, labels: Sequence[str]) -> tuple[BrushTag, str]:
    """The brush tag for an image that has one of these labels, and what it calls that one."""
    mine = [brush for brush in brushes if image in brush.images]
    if not mine:
        raise Refused(f"the labelling configuration has no BrushLabels with toName={image!r}")
    known = sorted({called for brush in mine for called in brush.labels.values()})
    if not labels and len(mine) == len(known) == 1:
        return mine[0], known[0]
    for brush in mine:
        for label in labels:
            if label in brush.labels or not brush.labels:
                return brush, brush.labels.get(label, label)
    asked = f"the label {labels[0]!r}" if labels else "a region without a label"
    raise Refused(f"no BrushLabels for {image!r} has {asked}; there are {', '.join(known) or 'none'}")
