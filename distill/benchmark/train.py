"""A training step: precisions, memory formats and compilation against each other, and the cache against memory."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill.benchmark.cache import CacheBenchmark, make_cache
from distill.benchmark.contenders import refuse_unknown_student
from distill.benchmark.machine import cost_alone, gpu_peak, machine, matrix_product_rate, pick_device
from distill.benchmark.timing import interleave, timed
from distill.checks import nearest
from distill.losses import Objective
from distill.recipe import Recipe
from distill.schema import CacheRecipe, StudentRecipe, TrainRecipe
from distill.student import student_config
from distill.train import learn, make_optimizer, to_training
from distill.training.batches import Batch, CachedImages, TimedBatches, TrainingOrder, make_loader
from distill.training.plan import Plan
from distill.training.rows import Group
from embeddings_cache.shards import EmbeddingsCache
from embeddings_cache.system import bar
from students import InputError, build_encoder

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
PAPER_IMAGES, PAPER_EPOCHS = 112_000, 8
KEPT, ENDLESS = 2, 1_000_000
"""Batches that lie in memory; steps that no benchmark comes to."""


@dataclass
class TrainBenchmark:
    name: str = "repvit_m0_9"  # the student
    downsample: str = "stride1"  # stride1 or fuse
    neck: str = "sam"  # sam or pyramid
    input_size: int | None = None  # side at which the backbone works, as student.input_size
    overrides: dict[str, Any] = field(default_factory=dict)  # its widths, depths, ..., as student.overrides
    image_size: int = 1024  # side of the square input in pixels
    batch_size: int = 2  # images a step
    precisions: str = "float32,bfloat16"  # after commas; the convolutions and products of the forward pass
    compile: bool = False  # also measure torch.compile
    rounds: int = 5  # of each, in turn
    steps: int = 2  # a round; on a GPU say 64: what is read ahead between rounds then counts little
    rows: int = 32  # images in the cache that is read; its pictures are noise, whose JPEGs are larger than photographs'
    workers: int | None = None  # processes that read it; default: as in training
    memory: bool = True  # also measure peak memory, on a CPU in processes of their own
    device: str = "auto"  # cpu, cuda; auto: cuda where there is one
    out: str = "benchmark.json"  # where the numbers go


@dataclass(frozen=True)
class Variant:
    """One way to compute the same step."""

    precision: str
    channels_last: bool
    compiled: bool

    def __str__(self) -> str:
        extras = (", channels_last" if self.channels_last else "") + (", compiled" if self.compiled else "")
        return self.precision + extras


def benchmark_train(settings: TrainBenchmark) -> dict[str, Any]:
    """Measure, and return what goes to `benchmark.json`.

    Raises:
        InputError: a setting that makes no sense.
    """
    precisions = settings.precisions.split(",")
    if unknown := [value for value in precisions if value not in PRECISIONS]:
        raise InputError(f"precisions={unknown[0]} is not known{nearest(unknown[0], PRECISIONS)}")
    refuse_unknown_student(settings.name)
    if settings.image_size % 64 or settings.rows < settings.batch_size:
        raise InputError("image_size is a multiple of 64, and rows are at least batch_size")
    build_encoder(student_config(made_up_recipe(settings)))  # before a cache is made: it may refuse the overrides
    device = pick_device(settings.device)
    variants = [
        Variant(precision, channels_last, compiled)
        for compiled in (False, True)[: 1 + settings.compile]
        for precision in precisions
        for channels_last in (False, True)
    ]
    with TemporaryDirectory(prefix="train-benchmark-") as directory:
        cache = Path(directory)
        make_cache(cache, CacheBenchmark(rows=settings.rows, image_size=settings.image_size))
        rows = _measure(settings, variants, cache, device)
    content: dict[str, Any] = {
        "settings": vars(settings),
        "machine": machine(device),
        "baseline": str(variants[0]),
        "rows": rows,
    }
    if device.type == "cuda":
        fastest = min(rows, key=lambda row: row["median_ms"])
        flops, rate = _flops_per_image(settings, device), matrix_product_rate(device)
        content |= {
            "flops_per_image": flops,
            "matrix_product_flops_per_s": rate,
            "share_of_matrix_product": round(flops * fastest["images_per_s"] / rate, 4),
            "fastest": fastest["backend"],
        }
    return content


def _measure(
    settings: TrainBenchmark, variants: list[Variant], cache: Path, device: torch.device
) -> list[dict[str, Any]]:
    in_memory = {str(variant): partial(step_in_memory, settings, variant, cache, device) for variant in variants}
    from_cache = {f"{variants[0]}, from the cache": partial(step_from_cache, settings, variants[0], cache, device)}
    prepared = {name: prepare() for name, prepare in {**in_memory, **from_cache}.items()}
    baseline = str(variants[0])
    times = interleave({name: timed(run, device) for name, run in prepared.items()}, settings.rounds, baseline)
    memory: dict[str, int] = {}
    if settings.memory and device.type == "cuda":
        memory = {name: gpu_peak(prepared[name], device) for name in in_memory}
    elif settings.memory:
        subjects = bar(in_memory.items(), desc="memory", leave=False)
        memory = {name: cost_alone(prepare).peak_bytes for name, prepare in subjects}
    rows = []
    for name, took in times.items():
        images_per_s = settings.steps * settings.batch_size / took.median
        row = {
            "name": settings.name,
            "backend": name,
            **took.as_json(settings.steps),
            "images_per_s": round(images_per_s, 3),
            "speed_up": took.speed_up,
            "hours_of_8_epochs": round(PAPER_EPOCHS * PAPER_IMAGES / images_per_s / 3600, 1),
        }
        if name in memory:
            row["peak_memory_bytes"] = memory[name]
        if name in from_cache:
            row["of_memory_step"] = row["ratio"]
        rows.append(row)
    return rows


def step_in_memory(
    settings: TrainBenchmark, variant: Variant, cache: Path, device: torch.device
) -> Callable[[], object]:
    """A round of steps on batches that lie on the device."""
    batches = read_batches(settings, cache, device)
    kept = [next(batches) for _ in range(KEPT)]
    batches.close()
    return partial(learn_from, Learner(settings, variant, device), cycle(kept), settings.steps)


def step_from_cache(
    settings: TrainBenchmark, variant: Variant, cache: Path, device: torch.device
) -> Callable[[], object]:
    """A round of steps on batches that training's own loader reads meanwhile."""
    return partial(
        learn_from, Learner(settings, variant, device), read_batches(settings, cache, device), settings.steps
    )


def read_batches(settings: TrainBenchmark, cache: Path, device: torch.device) -> Generator[Batch, None, None]:
    """Batches on the device, without end."""
    images = EmbeddingsCache(cache)
    recipe = made_up_recipe(settings)
    recipe.train.epochs = ENDLESS
    plan = Plan.of(recipe, len(images), 1)
    order = TrainingOrder(list(range(len(images))), plan, recipe.seed, Group(0, 1))
    return iter(
        TimedBatches(make_loader(CachedImages(images, recipe, with_prompts=False), order, recipe, device), device)
    )


def learn_from(learner: "Learner", batches: Iterator[Batch], steps: int) -> None:
    """So many optimizer steps."""
    for _ in range(steps):
        learner(next(batches))


class Learner:
    """Training's step for one variant, all of whose state is its own."""

    def __init__(self, settings: TrainBenchmark, variant: Variant, device: torch.device) -> None:
        self.recipe = made_up_recipe(settings)
        self.recipe.train.channels_last = variant.channels_last
        torch.manual_seed(0)
        student: nn.Module = build_encoder(student_config(self.recipe)).to(device)
        if variant.channels_last:
            student = student.to(memory_format=torch.channels_last)
        self.student: nn.Module = Autocast(student, PRECISIONS[variant.precision])
        if variant.compiled:
            self.student.compile()
        to_training(self.student, "local")
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        optimizer = make_optimizer(self.student, self.recipe.train, device)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.objective = Objective(settings.image_size)

    def __call__(self, batch: Batch) -> None:
        settings = self.recipe.train
        learn(batch, self.student, self.optimizer, self.objective, settings, 1e-4, self.recipe, self.accelerator)


class Autocast(nn.Module):
    """What Accelerate makes of a model for mixed precision; several precisions do not go into one of its processes."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the module, float32 out."""
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None):
            return self.module(x).float()


def made_up_recipe(settings: TrainBenchmark) -> Recipe:
    """The recipe that would train this student."""
    return Recipe(
        image_size=settings.image_size,
        student=StudentRecipe(
            settings.name,
            settings.input_size,
            settings.neck,
            downsample=settings.downsample,
            overrides=dict(settings.overrides),
        ),
        cache=CacheRecipe(dir=""),
        train=TrainRecipe(batch_size=settings.batch_size, workers=settings.workers),
    )


def _flops_per_image(settings: TrainBenchmark, device: torch.device) -> int:
    """Of forward and backward pass, two for a multiply-accumulate."""
    student = build_encoder(student_config(made_up_recipe(settings))).to(device)
    images = torch.zeros(2, 3, settings.image_size, settings.image_size, device=device)
    with FlopCounterMode(display=False) as counter:
        student(images).square().mean().backward()
    return counter.get_total_flops() // 2
