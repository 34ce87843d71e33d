"""A GPU in one run: what each stage that works on it costs there, with settings that suit one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from distill.benchmark.contenders import refuse_unknown_student
from distill.benchmark.evaluate import EvaluateBenchmark, benchmark_evaluate
from distill.benchmark.machine import machine, pick_device
from distill.benchmark.pipeline import PipelineBenchmark, benchmark_pipeline
from distill.benchmark.teacher import DRAWN, TeacherBenchmark, benchmark_teacher
from distill.benchmark.train import TrainBenchmark, benchmark_train
from distill.checks import nearest
from students import InputError, first_line

CACHED = 64
"""Images in the cache that training reads."""
SHARES = ("share_of_matrix_product", "matrix_product_flops_per_s")
"""What a part says of the GPU besides its rows."""


@dataclass
class GpuBenchmark:
    teacher: str = "vit_h"  # vit_h, vit_l, vit_b or toy, with random weights
    student: str = "repvit_m2_3"  # likewise
    image_size: int = 1024  # side of the square input in pixels
    teacher_batch: int = 8  # images a pass of the teacher
    batch_size: int = 16  # images a training step
    steps: int = 16  # training steps a round
    images: int = 64  # photographs read a round; twice as many from JPEG to shard, a quarter in evaluation
    masks: int = 64  # of each photograph in evaluation
    rounds: int = 3  # of each, in turn
    compile: bool = True  # also the teacher through torch.compile, half a minute
    device: str = "cuda"  # or cpu, to try the benchmark itself
    out: str = "benchmark.json"  # where the numbers go


def benchmark_gpu(settings: GpuBenchmark) -> dict[str, Any]:
    """Measure teacher, host, training step and evaluation one after another; some five minutes on a large GPU.

    Returns:
        What goes to `benchmark.json`: the rows of all parts, and what else each part says, by its name.

    Raises:
        InputError: there is no GPU, or a setting that makes no sense.
    """
    device = pick_device(settings.device)
    rows: list[dict[str, Any]] = []
    others: dict[str, Any] = {}
    for part, measure in parts(settings).items():
        print(f"gpu: {part} ...", flush=True)
        try:
            content = measure()
        except torch.OutOfMemoryError as error:
            rows.append({"name": part, "backend": settings.device, "reason": first_line(error)})
            continue
        rows += [{**row, "name": f"{part}: {row['name']}"} for row in content.pop("rows")]
        others[part] = {key: value for key, value in content.items() if key != "machine"}
    content = {"settings": vars(settings), "machine": machine(device), "parts": others, "rows": rows}
    shares = {f"{part}_{key}": other[key] for part, other in others.items() for key in SHARES if key in other}
    return {**content, **shares}


def parts(settings: GpuBenchmark) -> dict[str, Callable[[], dict[str, Any]]]:
    """The benchmarks, each with what suits a GPU.

    Raises:
        InputError: names that are not known, or numbers that do not go together.
    """
    if settings.teacher not in DRAWN:
        raise InputError(f"teacher={settings.teacher} is not known{nearest(settings.teacher, DRAWN)}")
    refuse_unknown_student(settings.student, "student")
    if (settings.image_size != 1024 and settings.teacher != "toy") or settings.image_size % 64:
        raise InputError(f"image_size={settings.image_size}: SAM's ViTs take 1024 px, teacher=toy a multiple of 64")
    if settings.images < settings.teacher_batch or settings.batch_size > CACHED:
        raise InputError(f"images are at least teacher_batch, and batch_size is at most {CACHED}")
    side, rounds, device = settings.image_size, settings.rounds, settings.device
    teacher = TeacherBenchmark(
        settings.teacher,
        image_size=side,
        batch_size=settings.teacher_batch,
        dtypes="bfloat16",
        compile=settings.compile,
        rounds=rounds,
        pipeline=2 * settings.images // settings.teacher_batch,
        memory=False,
        device=device,
    )
    pipeline = PipelineBenchmark(settings.images, image_size=side, batch_size=settings.teacher_batch, rounds=rounds)
    train = TrainBenchmark(
        settings.student,
        image_size=side,
        batch_size=settings.batch_size,
        precisions="bfloat16",
        rounds=rounds,
        steps=settings.steps,
        rows=CACHED,
        memory=False,
        device=device,
    )
    photographs = max(1, settings.images // 4)
    evaluate = EvaluateBenchmark(
        settings.student, side, masks=settings.masks, images=photographs, rounds=rounds, device=device
    )
    return {
        "teacher": lambda: benchmark_teacher(teacher),
        "pipeline": lambda: benchmark_pipeline(pipeline),
        "train": lambda: benchmark_train(train),
        "evaluate": lambda: benchmark_evaluate(evaluate),
    }
