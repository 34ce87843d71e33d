"""Evaluation: a photograph with many annotated masks, as `stage=evaluate` goes through it, and the parts of that."""

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import Sam

from distill.benchmark.contenders import refuse_unknown_student
from distill.benchmark.machine import machine, pick_device
from distill.benchmark.timing import NO_RATIO, interleave, timed
from distill.evaluate.compare import compare_rows, embed_both, make_prompts, score_image
from distill.schema import EvaluateRecipe
from embeddings_cache.images import encode_rle, resized_shape
from embeddings_cache.shards import CacheRow, encode_pixels
from students import InputError, build_student_sam, create_student, untrained_sam

PHOTOGRAPH = (2, 3)
"""Height to width, as most of SA-1B's."""
WHOLE = "whole"


@dataclass
class EvaluateBenchmark:
    name: str = "repvit_m0_9"  # the student, with random weights; so has the decoder
    image_size: int = 1024  # side of the square input in pixels
    longest_side: int = 2250  # of the photographs, in pixels
    masks: int = 16  # annotated masks a photograph; each is prompted by a point and by a box
    images: int = 1  # photographs a round; on a GPU say 16 with masks=64
    rounds: int = 3  # of each part, in turn
    device: str = "auto"  # cpu, cuda; auto: cuda where there is one
    out: str = "benchmark.json"  # where the numbers go


def benchmark_evaluate(settings: EvaluateBenchmark) -> dict[str, Any]:
    """Measure, and return what goes to `benchmark.json`.

    Raises:
        InputError: a setting that makes no sense.
    """
    refuse_unknown_student(settings.name)
    if settings.image_size % 64:
        raise InputError("image_size is a multiple of 64")
    device = pick_device(settings.device)
    torch.manual_seed(0)
    student = create_student(settings.name, settings.image_size)
    teacher = untrained_sam(student, settings.image_size).to(device).eval().requires_grad_(False)
    student_sam = build_student_sam(student, teacher)
    row = made_up_row(settings)
    times = interleave(
        {name: timed(part, device) for name, part in parts(settings, row, teacher, student_sam).items()},
        settings.rounds,
        WHOLE,
    )
    photographs = f"{settings.images} photographs of {row.original_size[1]} x {row.original_size[0]}"
    whole = times.pop(WHOLE)
    rows = [
        {
            "name": f"{photographs}, {settings.masks} masks each",
            "backend": WHOLE,
            **whole.as_json(),
            "images_per_s": round(settings.images / whole.median, 3),
        },
        *({"name": "one of them", "backend": name, **took.as_json(), **NO_RATIO} for name, took in times.items()),
    ]
    return {"settings": vars(settings), "machine": machine(device), "rows": rows}


def parts(
    settings: EvaluateBenchmark, row: CacheRow, teacher: Sam, student_sam: Sam
) -> dict[str, Callable[[], object]]:
    """What is measured: all that is done to some photographs, and each part of it for one."""
    asked = EvaluateRecipe(masks_per_image=settings.masks)
    embeddings = embed_both(row, student_sam)
    prompts = make_prompts(row, asked)
    return {
        WHOLE: lambda: deque(compare_rows([row] * settings.images, asked, teacher, student_sam), maxlen=0),
        "make prompts": lambda: make_prompts(row, asked),
        "embed": lambda: embed_both(row, student_sam),
        "masks and their IoUs": lambda: deque(score_image(row, teacher, *embeddings, prompts), maxlen=0),
    }


def made_up_row(settings: EvaluateBenchmark) -> CacheRow:
    """A photograph of noise and ellipses, most of them small, as objects are."""
    rng = np.random.default_rng(0)
    height, width = settings.longest_side * PHOTOGRAPH[0] // PHOTOGRAPH[1], settings.longest_side
    rows, columns = np.ogrid[:height, :width]
    entries = []
    for size in np.geomspace(0.01, 0.3, settings.masks) * width:
        y, x, stretch = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.5, 2)
        mask = ((rows - y) * stretch) ** 2 + ((columns - x) / stretch) ** 2 <= size**2
        entries.append({"segmentation": encode_rle(mask)})
    input_size = resized_shape((height, width), settings.image_size)
    pixels = rng.integers(0, 256, (*input_size, 3), dtype=np.uint8)
    cells = settings.image_size // 16
    embedding = rng.standard_normal((256, cells, cells)).astype(np.float16)
    annotation = json.dumps({"annotations": entries})
    return CacheRow("sa_0", embedding, encode_pixels(pixels, 95), (height, width), input_size, annotation)
