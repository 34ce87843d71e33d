"""Inspection: every picture decoded and every annotation checked as precompute would, without a teacher."""

import heapq
import json
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image, ImageDraw

from distill.pictures import overlay
from distill.reading import annotations_of, reading_of
from distill.recipe import Recipe
from embeddings_cache.images import (
    Account,
    Decoder,
    Sample,
    assign_sources,
    decode_masks,
    expand_sources,
    keep_key,
    look_through,
    pick_sources,
    read_images,
    resized_shape,
)
from embeddings_cache.shards import CacheIdentity, row_bytes
from embeddings_cache.system import available_cores, progress_bar, stable_hash, whole_file, write_json
from embeddings_cache.teacher import TOY_CHANNELS
from students import InputError, StudentConfig

MOST_THREADS = 8
SHOWN = 24
COLUMNS = 6
SHOWN_SIDE = 240
"""Pixels of a picture's longest side on the contact sheet."""
EXAMPLES = 3
ENDS = (0.5, 2, 8, 24)
SIZES = ("below 0.5 MP", "0.5-2 MP", "2-8 MP", "8-24 MP", "over 24 MP")
"""Groups of sizes, and where they end, in megapixels."""


class ContactSheet:
    """Some pictures with their masks, the same of the same data whatever their order: those whose keys hash lowest."""

    def __init__(self) -> None:
        self._shown: list[tuple[float, int, str, Image.Image]] = []
        self._turn = count()

    def offer(self, sample: Sample) -> None:
        """Keep it if it is among those shown."""
        place = -stable_hash(sample.key, "contact sheet")
        if len(self._shown) < SHOWN:
            heapq.heappush(self._shown, (place, next(self._turn), sample.key, thumbnail(sample)))
        elif place > self._shown[0][0]:
            heapq.heapreplace(self._shown, (place, next(self._turn), sample.key, thumbnail(sample)))

    def draw(self) -> Image.Image:
        """All of them, by key, each with its name below."""
        cell, line = SHOWN_SIDE + 8, 16
        rows = -(-len(self._shown) // COLUMNS)
        sheet = Image.new("RGB", (COLUMNS * cell, rows * (cell + line)), "white")
        draw = ImageDraw.Draw(sheet)
        for place, (_, _, key, picture) in enumerate(sorted(self._shown, key=lambda entry: entry[2])):
            left, top = place % COLUMNS * cell + 4, place // COLUMNS * (cell + line) + 4
            sheet.paste(picture, (left, top))
            draw.text((left, top + SHOWN_SIDE + 2), key[-36:].encode("ascii", "replace").decode(), fill="black")
        return sheet


def inspect(recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """Write `inspect.json` and `inspect.jpg` to the run directory, and print what they say; returns the former.

    Raises:
        InputError: a source that cannot be opened at all, or not one picture that can be used.
    """
    skipped: list[tuple[str, str]] = []
    noted: list[tuple[str, str]] = []
    account = Account(lambda *told: skipped.append(told), lambda *told: noted.append(told))
    found, sheet = Found(), ContactSheet()
    for sample in samples_of(recipe, account, accelerator):
        try:
            resized_shape(sample.original_size, recipe.image_size)
        except ValueError as error:
            skipped.append((sample.key, str(error)))
            continue
        found.add(sample)
        sheet.offer(sample)
    content = {
        **found.as_json(),
        "noted": by_reason(noted),
        "skipped": by_reason(skipped),
        "left_out": dict(sum(account.left_out.values(), Counter()).most_common()),
        "precompute": needs(recipe, found.images),
        "data": {
            "images": recipe.data.images,
            "fraction": recipe.data.fraction,
            "annotations": recipe.data.annotations,
        },
    }
    directory = Path(recipe.run_dir)
    write_json(directory / "inspect.json", content)
    if found.images:
        with whole_file(directory / "inspect.jpg") as temporary:
            sheet.draw().save(temporary, format="JPEG", quality=90)
    accelerator.print("\n".join(table(content)))
    accelerator.print(f"inspect: {directory / 'inspect.json'}" + (", inspect.jpg" if found.images else ""))
    if not found.images:
        raise InputError(f"no image could be read from {recipe.data.images!r}")
    return content


def samples_of(recipe: Recipe, account: Account, accelerator: Accelerator) -> Iterator[Sample]:
    """The recipe's images as precompute would read them, by all cores, with a progress bar."""
    sources, key_fraction = pick_sources(expand_sources(recipe.data.images), recipe.data.fraction)
    annotations = annotations_of(recipe)

    def wanted(key: str) -> bool:
        return keep_key(key, key_fraction)

    survey = look_through(sources, wanted, annotations or ())
    accelerator.print(f"inspect: {survey}")
    shares, threads = assign_sources(sources, 0, 1), min(MOST_THREADS, available_cores())
    decoder = Decoder(reading_of(recipe), annotations)
    with progress_bar(accelerator, "inspect", "images", total=survey.total) as progress:
        for sample in read_images(shares, wanted, account, decoder, threads):
            progress.update()
            yield sample


class Found:
    """What is told of the images that can be used."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.megapixels: list[float] = []
        self.smallest: tuple[int, int] | None = None
        self.largest: tuple[int, int] | None = None
        self.masks: list[int] = []

    @property
    def images(self) -> int:
        """How many."""
        return len(self.megapixels)

    def add(self, sample: Sample) -> None:
        """Count an image."""
        height, width = size = sample.original_size
        self.kinds[sample.kind] += 1
        self.megapixels.append(height * width / 1e6)
        sizes = [size, *filter(None, (self.smallest, self.largest))]
        self.smallest, self.largest = min(sizes, key=np.prod), max(sizes, key=np.prod)
        if sample.annotation is not None:
            self.masks.append(len(json.loads(sample.annotation)["annotations"]))

    def as_json(self) -> dict[str, Any]:
        """Counts by kind and size; sizes are (height, width)."""
        groups = Counter(SIZES[bisect(ENDS, value)] for value in self.megapixels)
        return {
            "images": self.images,
            "kinds": dict(self.kinds.most_common()),
            "sizes": {group: groups[group] for group in SIZES if groups[group]},
            "smallest": self.smallest,
            "largest": self.largest,
            "annotated": {
                "images": len(self.masks),
                "masks": sum(self.masks),
                "median_masks": median(self.masks) if self.masks else 0,
            },
        }


def by_reason(entries: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Reasons with how often and for which they were given, the commonest first."""
    keys: dict[str, list[str]] = {}
    for key, reason in entries:
        keys.setdefault(reason, []).append(key)
    told = sorted(keys.items(), key=lambda item: -len(item[1]))
    return [{"reason": reason, "count": len(of), "keys": of} for reason, of in told]


def needs(recipe: Recipe, rows: int) -> dict[str, Any]:
    """Rows that precompute will make, and about how many bytes they take."""
    cells = recipe.image_size // 16
    channels = TOY_CHANNELS if recipe.teacher.name == "toy" else StudentConfig.embed_dim
    expected = CacheIdentity(
        recipe.teacher.name,
        teacher_sha256="",
        teacher_dtype="",
        image_size=recipe.image_size,
        embedding_shape=(channels, cells, cells),
        dtype=recipe.cache.dtype,
        jpeg_quality=recipe.cache.jpeg_quality,
        preprocess="",
        data_images="",
        data_fraction=recipe.data.fraction,
    )
    return {"rows": rows, "bytes": rows * row_bytes(expected)}


def table(content: dict[str, Any]) -> list[str]:
    """What `inspect.json` says, for the terminal."""
    annotated, needed = content["annotated"], content["precompute"]
    smallest, largest = _size(content["smallest"]), _size(content["largest"])
    lines = [
        f"  images        {content['images']:,}: {_counts(content['kinds'])}",
        f"  sizes         {_counts(content['sizes'])}; from {smallest} to {largest}",
        f"  annotations   {annotated['images']:,} images, {annotated['masks']:,} masks",
        f"  precompute    {needed['rows']:,} rows, about {needed['bytes'] / 2**30:.1f} GiB",
    ]
    lines += _reasons("skipped", content["skipped"])
    lines += _reasons("noted", content["noted"])
    if content["left_out"]:
        lines.append(f"  left out      {_counts(content['left_out'])}")
    return lines


def thumbnail(sample: Sample) -> Image.Image:
    """A picture with its masks laid over it, small."""
    picture = sample.picture.copy()
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    masks = decode_masks(sample.annotation) if sample.annotation else ()
    small = [np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST)) for mask in masks]
    return Image.fromarray(overlay(np.asarray(picture), small))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items()) or "none"


def _size(size: tuple[int, int] | None) -> str:
    return f"{size[1]}×{size[0]}" if size else "none"


def _reasons(title: str, entries: list[dict[str, Any]]) -> Iterator[str]:
    for number, entry in enumerate(entries):
        keys = (key.encode("utf-8", "backslashreplace").decode() for key in entry["keys"][:EXAMPLES])
        shown = ", ".join(keys) + (", ..." if entry["count"] > EXAMPLES else "")
        yield f"  {'' if number else title:<13} {entry['count']:,}× {entry['reason']} ({shown})"
