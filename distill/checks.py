"""Which values of a recipe make sense; each that does not is one line that names it, its origin and what would do."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from omegaconf import OmegaConf

from distill.schema import (
    AUTO,
    BACKENDS,
    BATCH_NORMS,
    BOX_MASKS,
    BOX_SCORES,
    FORMATS,
    INPUTS,
    LOSSES,
    MASK_TARGETS,
    NEWEST_OPSET,
    OLDEST_OPSET,
    ON_REQUEST,
    ONE_OR_MORE,
    PRESETS,
    STAGES,
    TASKS,
    Recipe,
    numbers,
)
from embeddings_cache.images import SIXTEEN_BIT, scene_count
from embeddings_cache.shards import DTYPES
from embeddings_cache.teacher import TEACHER_DTYPES, known_teachers
from students import DOWNSAMPLES, NECKS, InputError, is_known, list_students

CHOICES: dict[str, Callable[[], Sequence[str | None]]] = {
    "stage": lambda: ("all", *STAGES, *ON_REQUEST),
    "student.downsample": lambda: DOWNSAMPLES,
    "student.neck": lambda: NECKS,
    "teacher.name": known_teachers,
    "teacher.dtype": lambda: TEACHER_DTYPES,
    "data.sixteen_bit": lambda: SIXTEEN_BIT,
    "cache.dtype": lambda: DTYPES,
    "train.mixed_precision": lambda: (AUTO, "no", "bf16", "fp16"),
    "train.batch_norm": lambda: BATCH_NORMS,
    "train.mask_targets": lambda: MASK_TARGETS,
    "evaluate.task": lambda: TASKS,
    "evaluate.preset": lambda: (*PRESETS,),
    "evaluate.masks": lambda: (None, *BOX_MASKS),
    "evaluate.score": lambda: (None, *BOX_SCORES),
    "export.input": lambda: INPUTS,
    "serve.backend": lambda: BACKENDS,
}
CHOICES_OF_EACH: dict[str, Callable[[], Sequence[str]]] = {
    "export.formats": lambda: (*FORMATS, "all"),
    "train.trackers": lambda: sorted(LOGGER_TYPE_TO_CLASS),
}

AT_LEAST_ONE = (
    "student.neck_expand", "teacher.batch_size", "data.val_images", "data.max_pixels", "cache.images_per_shard",
    "train.batch_size", "train.accumulate", "train.lr_per", "train.mask_prompts", "train.checkpoint_every",
    "train.keep_checkpoints", "train.log_every", "evaluate.masks_per_image", "evaluate.grid", "evaluate.clicks",
    "evaluate.limit", "evaluate.max_dets", "evaluate.thresholds", "export.images", "export.gate_images",
    "export.calibration_images", "predict.points_per_side", "serve.cache_mb", "serve.batch_size", "serve.threads",
    "serve.decoders", "serve.queue", "serve.max_pixels", "serve.prompts",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "student.neck_depth", "data.workers", "data.max_skipped", "train.epochs", "train.weight_decay",
    "train.lr_end", "train.warmup_steps", "train.warmup_epochs", "train.mask_points", "train.workers",
    "train.mask_rounds", "train.ema", "train.checkpoint_minutes",
    "train.stop_above", "train.watch_images", "evaluate.rounds", "verify.recompute", "port",
    "serve.batch_ms",
)  # fmt: skip
POSITIVE = (
    "data.fraction", "train.lr", "train.clip_norm", "train.huber_delta", "serve.body_mb", "serve.seconds",
    "serve.everything_seconds", "serve.stop_seconds",
)  # fmt: skip
AT_MOST_ONE = ("data.fraction", "train.mask_points")


def check_recipe(recipe: Recipe, origin: Callable[[str], str]) -> None:
    """Raise `InputError` for the first value that makes no sense; `origin` says where a key's value came from."""
    config = OmegaConf.structured(recipe)

    def refuse(key: str, value: Any, expected: str) -> None:
        raise InputError(f"{origin(key.partition('[')[0])}: {key}={value}{expected}")

    def said(key: str) -> Iterator[tuple[str, Any]]:
        """A key's value, and what the phases after the first say instead."""
        yield key, OmegaConf.select(config, key)
        for place, phase in enumerate(recipe.train.then):
            name = key.removeprefix("train.")
            if key.startswith("train.") and (value := getattr(phase, name, None)) is not None:
                yield f"train.then[{place}].{name}", value

    for key, choices in CHOICES.items():
        for shown, value in said(key):
            if value not in choices():
                refuse(shown, value, " is not known" + nearest(value, filter(None, choices())))
    if not is_known(recipe.student.name):
        refuse("student.name", recipe.student.name, " is not known" + nearest(recipe.student.name, list_students()))
    for key, known in CHOICES_OF_EACH.items():
        for value in OmegaConf.select(config, key):
            if value not in known():
                refuse(key, value, " is not known" + nearest(value, known()))
    for keys, holds, expected in (
        (AT_LEAST_ONE, lambda v: v >= 1, " is less than 1"),
        (NOT_NEGATIVE, lambda v: v >= 0, " is negative"),
        (POSITIVE, lambda v: v > 0, " is not above 0"),
        (AT_MOST_ONE, lambda v: v <= 1, " is more than 1"),
    ):
        for key in keys:
            for shown, value in said(key):
                if value is not None and not holds(value):
                    refuse(shown, value, expected)
    if not OLDEST_OPSET <= recipe.export.opset <= NEWEST_OPSET:
        refuse("export.opset", recipe.export.opset, f" is not {OLDEST_OPSET} to {NEWEST_OPSET}")
    if recipe.port > 65535:
        refuse("port", recipe.port, " is more than 65535")
    if not re.fullmatch(r"([A-Za-z]\w*)?", recipe.export.name or "", re.ASCII):
        refuse("export.name", recipe.export.name, " is no name of a class: letters, digits and underscores")
    if recipe.export.license is not None and not re.fullmatch(r"\S(.*\S)?", recipe.export.license):
        refuse("export.license", repr(recipe.export.license), " is no licence: one line, as apache-2.0")
    if not recipe.export.formats:
        refuse("export.formats", recipe.export.formats, " names no file to make")
    if recipe.image_size < 64 or recipe.image_size % 64:
        refuse("image_size", recipe.image_size, " is not a multiple of 64")
    batch, accumulate = recipe.train.batch_size, recipe.train.accumulate
    if batch % accumulate:
        refuse("train.batch_size", batch, f" does not divide by train.accumulate={accumulate}")
    pretrained = recipe.student.pretrained
    if not isinstance(pretrained, bool | str):
        refuse("student.pretrained", pretrained, " is neither true, false, auto, nor the path of a file")
    if recipe.student.start and pretrained is not False:
        refuse("student.pretrained", pretrained, f": student.start={recipe.student.start} is where the weights begin")
    if recipe.teacher.compile not in (True, False, "auto"):
        refuse("teacher.compile", recipe.teacher.compile, " is neither true, false, nor auto")
    quality = recipe.cache.jpeg_quality
    if quality != "png" and (type(quality) is not int or not 1 <= quality <= 100):
        refuse("cache.jpeg_quality", quality, " is neither 1-100 nor png")
    if recipe.evaluate.clicks > 5:
        refuse("evaluate.clicks", recipe.evaluate.clicks, " is more than 5")
    if recipe.train.ema >= 1:
        refuse("train.ema", recipe.train.ema, " is not below 1")
    if 0 < recipe.train.stop_above <= 1:
        refuse("train.stop_above", recipe.train.stop_above, " would stop every run: say more than 1, or 0")
    for place, phase in enumerate(recipe.train.then):
        if phase.epochs < 1:
            refuse(f"train.then[{place}].epochs", phase.epochs, " is less than 1")
    for key, weights in said("train.loss"):
        for name in weights:
            if name not in LOSSES:
                refuse(key, name, " is not known" + nearest(name, LOSSES))
        if min(weights.values(), default=0) < 0 or not any(weights.values()):
            refuse(key, weights, ": weights are not negative, and one is more than 0")
    if not recipe.data.images:
        refuse("data.images", recipe.data.images, ": say which tars or folder to use")
    for key in ONE_OR_MORE:
        value = OmegaConf.select(config, key)
        listed = value if isinstance(value, Sequence) and not isinstance(value, str) else [value or ""]
        if not listed or not all(isinstance(each, str) for each in listed):
            refuse(key, value, " is neither text nor a list of texts")
    if recipe.stage != "evaluate" and isinstance(recipe.checkpoint, list):
        refuse("checkpoint", recipe.checkpoint, f": stage={recipe.stage} takes one; stage=evaluate compares several")
    if recipe.stage != "evaluate" and str(recipe.evaluate.data).endswith(".json"):
        refuse("evaluate.data", recipe.evaluate.data, f" goes with stage=evaluate; stage={recipe.stage} takes pictures")
    if recipe.evaluate.task != "masks":
        if recipe.stage not in ("evaluate", *ON_REQUEST):
            refuse("evaluate.task", recipe.evaluate.task, " goes with stage=evaluate")
        if not isinstance(recipe.evaluate.data, str):
            refuse(
                "evaluate.data",
                recipe.evaluate.data,
                f": evaluate.task={recipe.evaluate.task} takes one file or folder",
            )
    for key, prompt, shape in (("point", recipe.point, "x,y"), ("box", recipe.box, "x0,y0,x1,y1")):
        if prompt is not None and not _is_prompt(prompt, shape):
            refuse(key, prompt, f" is not {shape} in pixels of the image")
    if scene_count(recipe.evaluate.data):
        refuse("evaluate.data", recipe.evaluate.data, ": scenes are made for data.images only")


def _is_prompt(text: str, shape: str) -> bool:
    try:
        values = numbers(text)
    except ValueError:
        return False
    if not all(map(math.isfinite, values)):
        return False
    if shape == "x,y":
        return len(values) % 2 == 0
    return len(values) == 4 and values[0] < values[2] and values[1] < values[3]


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or what is known where nothing is near."""
    known = list(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if len(known) <= 16 else "; --help lists what is known"
