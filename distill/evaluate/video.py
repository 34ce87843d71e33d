"""Video object segmentation on DAVIS 2017, by SAM-PT's way (arXiv:2307.01197): points are followed, SAM sees one frame.

From the paper (section 3): points on and beside each object of the first frame are followed through the video. In each
frame SAM is prompted with those that can be seen: with the points on the object alone; then with all of them, the
points on other objects among those beside it, and the earlier mask; then `evaluate.rounds` times with these, the
mask and its box.

From its code (github.com/SysCV/sam-pt): 12 rounds, and 3 for MobileSAM; one mask a prompt, never three; points within a
hundredth of the frame's edge count as not seen; a mask is dropped for a predicted IoU below 0.7; a pixel is that
object's whose logit is the highest.

Our reading: an object of which no point is seen has an empty mask, whatever points beside it are. Frames and
annotations are of one size, that of the folder that was found, 480p first; SAM-PT's defaults show SAM the
Full-Resolution frames, at 1024 px, and score at 480p. Objects are those of the first annotation.

RepViT-SAM's row (arXiv:2312.05760) has J&F of ViT-H 77.4, ViT-B 71.3, MobileSAM 71.1 and RepViT-SAM 73.5. Mind the
tracker: SAM-PT's documentation has MobileSAM at 71.07 with PIPS and 8 points an object, its defaults are CoTracker and
16. Without a file of tracks the points are Lucas–Kanade's, and results say so: they compare contestants, nothing else.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything.utils.amg import batched_mask_to_box

from distill.evaluate.davis import BACKGROUND, VOID, compare_object, read_labels, write_labels
from distill.evaluate.decoding import Seen, Segmenter, read_photograph
from distill.evaluate.tracks import follow_points, read_tracks, start_points
from distill.reading import reading_of
from distill.recipe import Recipe
from embeddings_cache.images import Reading
from embeddings_cache.system import sha256
from students import InputError

COLUMNS = ("J&F", "J", "F")
UNIT = "sequences"

LAYOUTS, RESOLUTIONS = ("", "DAVIS"), ("480p", "Full-Resolution", "")
"""Where within `evaluate.data`, and within its `JPEGImages/` and `Annotations/`, the sequences may lie."""
LISTED = Path("ImageSets", "2017", "val.txt")
PICTURES = (".jpg", ".jpeg", ".png")

MIN_PREDICTED_IOU = 0.7
EDGE = 0.01
"""Of a frame's width or height: points that are so close to its edge are not used."""

LUCAS_KANADE = "lucas-kanade"
NOTE = "points by Lucas–Kanade: not comparable to published numbers"


@dataclass(frozen=True)
class Clip:
    """A sequence: its frames, as many annotations, and the points that were followed through it, if there are any."""

    key: str
    frames: tuple[Path, ...]
    annotations: tuple[Path, ...]
    tracks: Path | None

    @property
    def files(self) -> Sequence[Path]:
        """All of them."""
        return *self.frames, *self.annotations, *([self.tracks] if self.tracks else [])


def settings(recipe: Recipe) -> dict[str, Any]:
    """Masks depend on how often they are refined, and on the points."""
    tracks = {clip.key: sha256(clip.tracks) for clip in find(recipe) if clip.tracks}
    return {"rounds": recipe.evaluate.rounds, "tracks": tracks or LUCAS_KANADE}


def find(recipe: Recipe) -> list[Clip]:
    """The sequences of DAVIS 2017's `val.txt`, in its order; where there is no such file, all of them, by name.

    Raises:
        InputError: no such folders, a sequence that is listed is not there, or one has no `.npz` among the tracks.
    """
    root, frames, annotations = _layout(Path(recipe.evaluate.data))
    folders = sorted(path for path in frames.glob("[!.]*") if path.is_dir())
    found = {folder.name: files for folder in folders if (files := _frames(folder))}
    names = [*found]
    if (listed := root / LISTED).exists():
        names = [*dict.fromkeys(listed.read_text(errors="replace").split())]
        if missing := [name for name in names if name not in found]:
            raise InputError(f"{frames} has no frames of {missing[0]}, nor of {len(missing) - 1} others of {listed}")
    if not names:
        raise InputError(f"{frames} has no folder of frames")
    tracks = _tracks(recipe, root)
    if tracks and (missing := [name for name in names if not (tracks / f"{name}.npz").exists()]):
        raise InputError(f"{tracks} has no {missing[0]}.npz, nor of {len(missing) - 1} other sequences")
    return [
        Clip(
            name,
            found[name],
            tuple(annotations / name / f"{frame.stem}.png" for frame in found[name]),
            tracks / f"{name}.npz" if tracks else None,
        )
        for name in names
    ]


def _layout(data: Path) -> tuple[Path, Path, Path]:
    """What `evaluate.data` holds: DAVIS's folder, and those of its sequences' frames and annotations."""
    for layout in LAYOUTS:
        for resolution in RESOLUTIONS:
            root = data / layout
            frames, annotations = root / "JPEGImages" / resolution, root / "Annotations" / resolution
            if frames.is_dir() and annotations.is_dir():
                return root, frames, annotations
    raise InputError(
        f"evaluate.data={data} is not laid out as DAVIS 2017: JPEGImages/480p/SEQUENCE/*.jpg and "
        "Annotations/480p/SEQUENCE/*.png, within it or within DAVIS/"
    )


def _frames(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in PICTURES))


def _tracks(recipe: Recipe, root: Path) -> Path | None:
    """The folder of tracks; None where points are to be followed here."""
    if (named := recipe.evaluate.tracks) is None:
        return next(
            (folder for folder in (Path(recipe.evaluate.data) / "tracks", root / "tracks") if folder.is_dir()), None
        )
    if not Path(named).is_dir():
        raise InputError(f"evaluate.tracks={named} is no folder")
    return Path(named)


def measure(item: Clip, segmenter: Segmenter, recipe: Recipe, pictures: Path) -> dict[str, Any]:
    """J and F of each object in every frame but the first and the last; label maps go to `pictures`, as DAVIS has them.

    The first one is what was given, as SAM-PT has it.
    """
    given = read_labels(item.annotations[0])
    numbers = [int(number) for number in np.unique(given) if number not in (BACKGROUND, VOID)]
    if not numbers:
        raise InputError(f"{item.annotations[0]} shows no object")
    if len(item.frames) < 3:
        raise InputError(f"{item.frames[0].parent} has {len(item.frames)} frames: the first and the last do not count")
    frames = partial(_read_frames, item.frames, given.shape, reading_of(recipe))
    if item.tracks:
        tracks = read_tracks(item.tracks, len(item.frames), len(numbers))
    else:
        tracks = follow_points(frames(), *start_points([given == number for number in numbers]))
    names = np.array([BACKGROUND, *numbers], dtype=np.uint8)
    scores: dict[str, dict[str, list[float]]] = {str(number): {"J": [], "F": []} for number in numbers}
    for place, image in enumerate(frames()):
        if place == 0:
            labels = np.where(given == VOID, np.uint8(BACKGROUND), given)
        else:
            seen = segmenter.look(image)
            labels = names[label_frame(seen, tracks.points[place], tracks.visible[place], recipe.evaluate.rounds)]
        write_labels(pictures / item.key / f"{item.frames[place].stem}.png", labels)
        if 0 < place < len(item.frames) - 1:
            truth = _of_size(item.annotations[place], read_labels(item.annotations[place]), given.shape)
            for number in numbers:
                region, contour = compare_object(truth, labels, number)
                scores[str(number)]["J"].append(region)
                scores[str(number)]["F"].append(contour)
    return {"objects": scores, "tracks": "file" if item.tracks else LUCAS_KANADE}


def summarize(results: Mapping[str, dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """J and F, of each object the mean of its frames, of these the mean over all objects of all sequences."""
    objects = [scores for result in results.values() for scores in result["objects"].values()]
    region, contour = (float(np.mean([np.mean(scores[name]) for scores in objects])) for name in ("J", "F"))
    numbers = {"J&F": (region + contour) / 2, "J": region, "F": contour, "objects": len(objects)}
    if any(result["tracks"] == LUCAS_KANADE for result in results.values()):
        return {**numbers, "tracks": LUCAS_KANADE, "note": NOTE}
    return {**numbers, "tracks": "file"}


@torch.no_grad()
def label_frame(seen: Seen, points: np.ndarray, visible: np.ndarray, rounds: int) -> np.ndarray:
    """Which object each pixel of a frame is of.

    Args:
        points: (objects, points, 2) as (x, y) in pixels; the last of an object's points is beside it.
        visible: boolean (objects, points).
        rounds: refinements of a mask.

    Returns:
        int64 (H, W): 0 where no object's logit is above the threshold, else one more than the object's place.
    """
    height, width = seen.original_size
    shares = points / (width, height)
    visible = visible & ((shares >= EDGE) & (shares <= 1 - EDGE)).all(axis=-1)
    on = [points[place, :-1][visible[place, :-1]] for place in range(len(points))]
    device = seen.embedding.device
    highest = torch.full((height, width), seen.sam.mask_threshold, device=device)
    labels = torch.zeros((height, width), dtype=torch.long, device=device)
    for place, positive in enumerate(on):
        own = points[place, -1:][visible[place, -1:]]
        negative = np.concatenate([own, *on[:place], *on[place + 1 :]])
        logits = segment_object(seen, positive, negative, rounds) if len(positive) else None
        if logits is not None:
            labels = torch.where(logits > highest, place + 1, labels)
            highest = torch.maximum(logits, highest)
    return labels.cpu().numpy()


def segment_object(seen: Seen, positive: np.ndarray, negative: np.ndarray, rounds: int) -> torch.Tensor | None:
    """Logits (H, W) of what points (P, 2) are on and others (N, 2) beside; None where SAM takes it for no good mask."""
    points = np.concatenate([positive, negative])[None]
    labels = np.repeat([1, 0], [len(positive), len(negative)])[None]
    [(low_res, _)] = seen.decode(points=positive[None])
    [(low_res, predicted_iou)] = seen.decode(points=points, labels=labels, masks=low_res[:, 0])
    [logits] = seen.enlarge(low_res[:, 0])
    for _ in range(rounds):
        mask = logits > seen.sam.mask_threshold
        if mask.sum() < 2:
            break
        box = batched_mask_to_box(mask).cpu().numpy()
        [(low_res, predicted_iou)] = seen.decode(points=points, labels=labels, boxes=box, masks=low_res[:, 0])
        [logits] = seen.enlarge(low_res[:, 0])
    return logits[0] if predicted_iou.item() >= MIN_PREDICTED_IOU else None


def _read_frames(paths: Sequence[Path], size: tuple[int, int], reading: Reading) -> Iterator[np.ndarray]:
    """RGB uint8 (H, W, 3), one at a time."""
    for path in paths:
        yield _of_size(path, read_photograph(path, reading), size)


def _of_size(path: Path, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A frame or an annotation, if it has the size of the first annotation."""
    if values.shape[:2] != size:
        raise InputError(f"{path} has {values.shape[1]}×{values.shape[0]} px, the first annotation {size[1]}×{size[0]}")
    return values
