"""Recipes: the dataclasses are the schema, YAML fills them, `key.sub=value` on the command line overrides.

A mistake is one `InputError` that names it, where it came from, and the nearest thing that would be right.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from embeddings_cache.format import DTYPES
from embeddings_cache.scenes import scene_count
from embeddings_cache.teacher import TEACHERS
from students import InputError, first_line, list_students

# The comment behind each field is what `--help` says of it.


@dataclass
class StudentRecipe:
    name: str = "repvit_m2_3"  # backbone: a timm repvit_* or tiny_vit_*
    downsample: str = "stride1"  # how the last stage stays at stride 16: stride1, as RepViT-SAM and MobileSAM do
    pretrained: bool = False  # start from timm's ImageNet weights (downloaded)
    overrides: dict[str, Any] = field(default_factory=dict)  # backbone numbers to change: widths, depths, ...


@dataclass
class TeacherRecipe:
    name: str = "vit_h"  # vit_h, vit_l, vit_b (also fine-tuned), or toy, which needs no weights
    checkpoint: str | None = None  # weights in segment-anything's layout (.pth); not for toy
    batch_size: int = 1  # images a teacher pass, in each process


@dataclass
class DataRecipe:
    images: Any = None  # tars, globs, brace patterns, URLs, pipe: commands or folders, one or a list; scenes:N makes N
    fraction: float = 1.0  # share of the images to use: whole tars first, then keys by hash
    val_images: int = 100  # images held out by hash, never trained on
    max_skipped: float = 0.01  # share of bad samples above which precompute stops


@dataclass
class CacheRecipe:
    dir: str = "caches/${teacher.name}-${image_size}px"  # where the embeddings go; recipes of one teacher may share it
    dtype: str = "float16"  # how embeddings are stored
    images_per_shard: int = 256  # rows a shard, and so what a crash costs at most
    jpeg_quality: Any = 95  # 1-100, or png for lossless; teacher and student see the picture after this


@dataclass
class TrainRecipe:
    epochs: int = 8  # passes over the training images; 0 leaves the student untrained, to compare with
    batch_size: int = 8  # images an optimizer step, over all processes and accumulation steps
    accumulate: int = 1  # forward passes an optimizer step: more of them need less memory
    lr: float = 1e-3  # peak learning rate (AdamW)
    weight_decay: float = 0.05  # of AdamW; not for norms and biases
    warmup_steps: int = 500  # steps of linear warm-up (a tenth of the run at most), then cosine to 0
    clip_norm: float = 1.0  # gradients are clipped to this norm
    loss: dict[str, float] = field(default_factory=lambda: {"mse": 1.0})  # weight by loss; mse: of the embeddings
    mixed_precision: str = "no"  # no, bf16 or fp16
    workers: int | None = None  # processes that read the cache, for each training process; default: 4, on a CPU none
    checkpoint_every: int = 1000  # optimizer steps between checkpoints
    log_every: int = 10  # optimizer steps between lines of metrics.jsonl


@dataclass
class EvaluateRecipe:
    task: str = "masks"  # what to measure
    data: Any = None  # other images to evaluate on, tars or folders; default: the held-out images of the cache
    masks_per_image: int = 64  # prompts an image at most, the first of its annotation
    grid: int = 8  # images without annotations are prompted with grid x grid points


@dataclass
class ExportRecipe:
    formats: list[str] = field(default_factory=lambda: ["onnx"])  # which files to make: onnx


@dataclass
class Recipe:
    name: str = ""  # the recipe's name; from its file
    stage: str = "all"  # all, or one of precompute, train, evaluate, export, report
    seed: int = 0  # of weights and of the order of images
    image_size: int = 1024  # side of the square input in pixels
    run_dir: str = "runs/${name}"  # where results go
    checkpoint: str | None = None  # student to evaluate or export; default: the run's own student.safetensors
    student: StudentRecipe = field(default_factory=StudentRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    cache: CacheRecipe = field(default_factory=CacheRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    evaluate: EvaluateRecipe = field(default_factory=EvaluateRecipe)
    export: ExportRecipe = field(default_factory=ExportRecipe)


STAGES = ("precompute", "train", "evaluate", "export", "report")

CHOICES: dict[str, Callable[[], Sequence[str]]] = {
    "stage": lambda: ("all", *STAGES),
    "student.name": list_students,
    "student.downsample": lambda: ("stride1",),
    "teacher.name": lambda: TEACHERS,
    "cache.dtype": lambda: DTYPES,
    "train.mixed_precision": lambda: ("no", "bf16", "fp16"),
    "evaluate.task": lambda: ("masks",),
}
CHOICES_OF_EACH: dict[str, tuple[str, ...]] = {"export.formats": ("onnx",), "train.loss": ("mse",)}

AT_LEAST_ONE = (
    "teacher.batch_size", "data.val_images", "cache.images_per_shard", "train.batch_size",
    "train.accumulate", "train.checkpoint_every", "train.log_every", "evaluate.masks_per_image", "evaluate.grid",
)  # fmt: skip
NOT_NEGATIVE = ("seed", "train.epochs", "data.max_skipped", "train.weight_decay", "train.warmup_steps", "train.workers")
POSITIVE = ("data.fraction", "train.lr", "train.clip_norm")

IMAGES = ("data.images", "evaluate.data")

SHAPES_THE_STUDENT = (
    "seed", "image_size", "student", "teacher.name", "data.images", "data.fraction", "data.val_images", "cache.dtype",
    "cache.jpeg_quality", "train.epochs", "train.batch_size", "train.accumulate", "train.lr", "train.weight_decay",
    "train.warmup_steps", "train.clip_norm", "train.loss", "train.mixed_precision",
)  # fmt: skip
"""Keys (or sections) that decide what comes out of training; the rest says where, how fast, or what comes after."""


def load_recipe(arguments: list[str]) -> Recipe:
    """`["recipe=NAME", "key=value", ...]` → the resolved recipe.

    Raises:
        InputError: no or an unknown recipe, an unknown key, a value of the wrong type or out of range.
    """
    overrides: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise InputError(f"command line: {argument!r} is not key=value (see --help)")
        overrides[key] = value
    if "recipe" not in overrides:
        raise InputError(f"command line: recipe=NAME is missing; recipes: {', '.join(list_recipes())}")
    path = find_recipe(overrides.pop("recipe"))
    shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)

    schema = OmegaConf.structured(Recipe)
    OmegaConf.update(schema, "name", path.stem)
    config = _merge(schema, _read_yaml(path), shown)
    typed = {key: _parse(key, value) for key, value in overrides.items()}
    config = _merge(config, _nested(typed), "command line")
    try:
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise InputError(f"{shown}: {first_line(error)}") from error
    assert isinstance(recipe, Recipe)
    typed_here = [key.split(".") for key in overrides]
    _check(recipe, lambda key: "command line" if any(_overlap(key.split("."), o) for o in typed_here) else shown)
    return recipe


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in files("recipes").iterdir() if entry.name.endswith("yaml")
    )


def find_recipe(name: str) -> Path:
    """A recipe's file, by name or path.

    Raises:
        InputError: there is none.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise InputError(f"command line: recipe={name}: no such file")
        return Path(name)
    if name not in list_recipes():
        raise InputError(f"command line: unknown recipe {name!r}{nearest(name, list_recipes())}")
    return Path(str(files("recipes") / f"{name}.yaml"))


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, for all stages, as YAML that `recipe=PATH` takes."""
    return OmegaConf.to_yaml(OmegaConf.structured(replace(recipe, stage="all")), resolve=True)


def differences(recipe: Recipe, saved: Path) -> list[str]:
    """`key: earlier value, now value` for every key that shapes the student and differs from a saved recipe.

    Raises:
        InputError: the saved recipe is damaged, or of a version with other keys.
    """
    earlier = _merge(OmegaConf.structured(Recipe), _read_yaml(saved), str(saved))
    now = OmegaConf.structured(recipe)
    pairs = ((key, OmegaConf.select(earlier, key), OmegaConf.select(now, key)) for key in SHAPES_THE_STUDENT)
    return [f"{key}: {then}, now {value}" for key, then, value in pairs if then != value]


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """Key, default and comment of everything that a recipe may set, in order."""
    yield from _describe(Recipe, "")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or what is known where nothing is near."""
    known = list(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if len(known) <= 16 else "; --help lists what is known"


def _describe(schema: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(schema), re.MULTILINE))
    defaults = schema()
    for entry in fields(schema):
        default = getattr(defaults, entry.name)
        if is_dataclass(default):
            yield from _describe(type(default), f"{prefix}{entry.name}.")
        else:
            shown = yaml.safe_dump(default, default_flow_style=True).removesuffix("\n...\n").strip()
            yield f"{prefix}{entry.name}", shown, comments.get(entry.name, "")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a recipe: keys and values are expected")
    return content


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans, so that `mixed_precision: no` and a date stay text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))


def _parse(key: str, value: str) -> Any:
    """A command line value; where text is expected it stays as it is typed, for YAML would change some of it."""
    kinds = _kinds(Recipe, "")
    if value == "null" or (key in IMAGES and not value):
        return None
    if kinds.get(key) in (str, str | None) or (key in IMAGES and not value.startswith("[")):
        return value
    try:
        return yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"command line: {key}={value} is not valid YAML: {first_line(error)}") from error


def _kinds(schema: type, prefix: str) -> dict[str, Any]:
    """The type of every key."""
    kinds: dict[str, Any] = {}
    for entry in fields(schema):
        kind = entry.type
        if isinstance(kind, type) and is_dataclass(kind):
            kinds |= _kinds(kind, f"{prefix}{entry.name}.")
        else:
            kinds[f"{prefix}{entry.name}"] = kind
    return kinds


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` → `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
            if not isinstance(branch, dict):
                raise InputError(f"command line: {key} and {section} cannot both be given")
        branch[name] = value
    return tree


def _merge(config: Any, values: dict[str, Any], origin: str) -> Any:
    known = [key for key, _, _ in describe_keys()]
    for key in _flat_keys(values, known):
        if key not in known:
            raise InputError(f"{origin}: unknown key {key!r}{nearest(key, known)}")
    try:
        return OmegaConf.merge(config, values)
    except OmegaConfBaseException as error:
        name = getattr(error, "full_key", None)
        raise InputError(f"{origin}: {name + ': ' if name else ''}{first_line(error)}") from error


def _flat_keys(values: dict[str, Any], known: list[str], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and any(other.startswith(f"{key}.") for other in known):
            yield from _flat_keys(value, known, f"{key}.")
        else:
            yield key


def _overlap(key: list[str], other: list[str]) -> bool:
    """Whether one key is the other, or a section that holds it."""
    return all(mine == theirs for mine, theirs in zip(key, other, strict=False))


def _check(recipe: Recipe, origin: Callable[[str], str]) -> None:
    config = OmegaConf.structured(recipe)

    def refuse(key: str, value: Any, expected: str) -> None:
        raise InputError(f"{origin(key)}: {key}={value}{expected}")

    for key, choices in CHOICES.items():
        if (value := OmegaConf.select(config, key)) not in choices():
            refuse(key, value, " is not known" + nearest(value, choices()))
    for key, known in CHOICES_OF_EACH.items():
        for value in OmegaConf.select(config, key):
            if value not in known:
                refuse(key, value, " is not known" + nearest(value, known))
    for keys, holds, expected in (
        (AT_LEAST_ONE, lambda v: v >= 1, " is less than 1"),
        (NOT_NEGATIVE, lambda v: v >= 0, " is negative"),
        (POSITIVE, lambda v: v > 0, " is not above 0"),
    ):
        for key in keys:
            if (value := OmegaConf.select(config, key)) is not None and not holds(value):
                refuse(key, value, expected)
    if recipe.image_size < 64 or recipe.image_size % 64:
        refuse("image_size", recipe.image_size, " is not a multiple of 64")
    if recipe.data.fraction > 1:
        refuse("data.fraction", recipe.data.fraction, " is more than 1")
    batch, accumulate = recipe.train.batch_size, recipe.train.accumulate
    if batch % accumulate:
        refuse("train.batch_size", batch, f" does not divide by train.accumulate={accumulate}")
    quality = recipe.cache.jpeg_quality
    if quality != "png" and (type(quality) is not int or not 1 <= quality <= 100):
        refuse("cache.jpeg_quality", quality, " is neither 1-100 nor png")
    weights = recipe.train.loss
    if min(weights.values(), default=0) < 0 or not any(weights.values()):
        refuse("train.loss", weights, ": weights are not negative, and one is more than 0")
    if not recipe.data.images:
        refuse("data.images", recipe.data.images, ": say which tars or folder to use")
    for key, images in zip(IMAGES, (recipe.data.images, recipe.evaluate.data), strict=True):
        listed = images if isinstance(images, list) else [images or ""]
        if not all(isinstance(source, str) for source in listed):
            refuse(key, images, " is neither text nor a list of texts")
    if scene_count(recipe.evaluate.data):
        refuse("evaluate.data", recipe.evaluate.data, ": scenes are made for data.images only")
