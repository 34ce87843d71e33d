"""Wild: Segmentation in the Wild, 25 sets of the challenge with X-Decoder (arXiv:2212.11270; RepViT-SAM's table).

Each set is a folder with `valid/_annotations_min1cat.coco.json` and its images beside it; boxes come from a detector's
results, a file a set (Grounding DINO's, in the literature). The best 100 boxes of an image, without a threshold, one
mask each, the box's score. The number is the mean of the sets' AP, each counting the same.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from distill.evaluate.coco import read_boxes, read_coco
from distill.evaluate.decoding import Segmenter
from distill.evaluate.instances import Pictured, Protocol, pictures_of, score_masks, segment_boxes
from distill.recipe import Recipe
from embeddings_cache.system import sha256
from students import InputError

COLUMNS = ("AP",)
UNIT = "images"

ANNOTATIONS = "valid/_annotations_min1cat.coco.json"
PROTOCOL = Protocol("single", "detector", 100)


def settings(recipe: Recipe) -> dict[str, Any]:
    """The files of annotations and boxes."""
    return {"sets": {name: [sha256(file), sha256(boxes_of(recipe, name))] for name, file in sets_of(recipe).items()}}


def find(recipe: Recipe) -> list[Pictured]:
    """All images of all sets that are there.

    Raises:
        InputError: no set, or one without boxes.
    """
    sets = sets_of(recipe)
    for name, file in sets.items():
        read_boxes(boxes_of(recipe, name), file)
    return [picture for name, file in sets.items() for picture in pictures_of(file, f"{name}/")]


def measure(item: Pictured, segmenter: Segmenter, recipe: Recipe, pictures: Path) -> dict[str, Any]:
    """Masks of an image, as `segment_boxes` gives them."""
    name = item.key.rpartition("/")[0]
    boxes = read_boxes(boxes_of(recipe, name), item.coco).get(item.id, [])
    return segment_boxes(item, boxes, segmenter, recipe, PROTOCOL)


def summarize(results: Mapping[str, dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """The mean of the sets' AP, each set's, and how many sets there were."""
    sets = {}
    for name, file in sets_of(recipe).items():
        if own := {key: result for key, result in results.items() if key.rpartition("/")[0] == name}:
            sets[name] = score_masks(file, own, "wild", f"{name}/")
    known = [numbers["AP"] for numbers in sets.values() if numbers["AP"] is not None]
    return {"AP": fmean(known) if known else None, "sets": sets, "note": f"mean of {len(known)} sets, of 25"}


def sets_of(recipe: Recipe) -> dict[str, Path]:
    """Annotation files by the name of their set.

    Raises:
        InputError: there is none.
    """
    root = Path(recipe.evaluate.data)
    found = {file.parent.parent.name: file for file in sorted(root.glob(f"*/{ANNOTATIONS}"))}
    if not found:
        raise InputError(f"evaluate.data={root} is not laid out as Segmentation in the Wild: SET/{ANNOTATIONS}")
    for file in found.values():
        read_coco(file)
    return found


def boxes_of(recipe: Recipe, name: str) -> Path:
    """The detector's results of a set: NAME.json in `evaluate.boxes`.

    Raises:
        InputError: there are none.
    """
    if recipe.evaluate.boxes is None:
        raise InputError(
            "evaluate.task=wild takes a detector's boxes: evaluate.boxes=FOLDER, with SET.json for each set"
        )
    path = Path(recipe.evaluate.boxes) / f"{name}.json"
    if not path.is_file():
        raise InputError(f"evaluate.boxes={recipe.evaluate.boxes} has no {path.name}")
    return path
