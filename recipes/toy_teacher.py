"""Train the toy teacher, the small SAM that comes with the package, on generated scenes; or one like it on photographs.

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m recipes.toy_teacher
    python -m recipes.toy_teacher images='train/*.tar' test='test/*.tar' --out small_sam.safetensors

As SAM was trained (arXiv:2304.02643, appendix A): the first prompt is a random point of a mask, or its box with noise;
corrective clicks follow, each drawn from where the mask is still wrong, with the previous logits as mask prompt; focal
and dice loss stand 20:1, with the squared error of the predicted IoU; of the three masks for an ambiguous prompt only
the best one learns. Unlike there, after the first prompt the single mask learns too, whatever the prompt was; logits
are compared at the decoder's own resolution with the share of each cell that the mask covers; and the first 7,000
steps on scenes are taken at half the image size, where they cost half.

The weights in the package came from the first command: seed 20230405, 95 minutes on two cores (torch 2.15, the machine
not quite idle). mIoU with the ground truth on the 200 unseen scenes of `measure`: 0.828 for one point, 0.880 for one
box; a box that is filled whole would score 0.547.

The second takes photographs with masks beside them, whatever a recipe's `data.images` takes, and measures on those of
`test`, or on a tenth that it does not learn from. It starts from the package's weights, unless `--start` says other.
`teacher.name=toy teacher.checkpoint=small_sam.safetensors` then teaches with it. docs/training.md has measurements.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from safetensors.torch import save
from segment_anything.modeling import Sam
from torch import nn

from distill.evaluate.compare import make_prompts, score_image
from distill.schema import EvaluateRecipe
from distill.train import parameter_groups
from embeddings_cache.embed import Prepared, embedded_rows, prepare
from embeddings_cache.images import Sample, generate_scene, normalize, resize_longest_side, sa1b_annotation
from embeddings_cache.system import progress_bar, whole_file
from embeddings_cache.teacher import (
    TOY_IMAGE_SIZE,
    WEIGHTS,
    TeacherEncoder,
    build_toy_sam,
    load_toy_state,
    read_toy_state,
    resolve_dtype,
)
from recipes import toy_photographs
from recipes.toy_losses import Example, average_gradients, backward
from students import InputError

SEED = 20230405  # the day SAM was published; scenes of the quickstart have seed 0
SCENES = 12_000
PHASES = ((TOY_IMAGE_SIZE // 2, 7_000), (TOY_IMAGE_SIZE, 8_500))
"""Image size and optimizer steps."""
BATCH = 8
"""Pictures a step, over all processes."""
MASKS = 6
LEARNING_RATE = 1e-3
WARMUP = 200
SAVE_EVERY = 1000
PARTIAL = ".partial.safetensors"
MIN_AREA = 25
MEASURED_SCENES = 200

PHOTOGRAPH_STEPS, SAVE_PHOTOGRAPHS_EVERY = 500, 100
"""About half an hour of one core for a few hundred photographs."""

PACKAGE_WEIGHTS = Path(str(files("embeddings_cache.teacher") / WEIGHTS))

Scene = tuple[np.ndarray, np.ndarray]
"""RGB uint8 (H, W, 3), and the number of the shape that each pixel shows, uint8 (H, W), 0 for the ground."""


@dataclass(frozen=True)
class Course:
    """What the toy learns from, and how.

    Attributes:
        pictures: scenes or photographs.
        augment: a picture, an image size and random numbers → an example.
        measure: mIoU by prompt on other pictures: the first so many, or all.
        phases: image size and optimizer steps.
        shorter: how many times fewer steps are taken.
        masks: of a picture, at most.
        warmup: steps until the learning rate has its peak.
        save_every: so many steps weights are saved, and measured on a few pictures.
        dtype: that the encoder computes in.
        start: weights to begin with; drawn ones where there are none.
    """

    pictures: Sequence[Any]
    augment: Callable[[Any, int, np.random.Generator], Example]
    measure: Callable[[Sam, int | None], dict[str, float]]
    phases: Sequence[tuple[int, int]]
    shorter: int = 1
    masks: int = MASKS
    warmup: int = WARMUP
    save_every: int = SAVE_EVERY
    dtype: torch.dtype = torch.bfloat16
    start: dict[str, torch.Tensor] | None = None


def main(arguments: list[str] | None = None) -> int:
    """Train on what the command line says; returns the exit code, not 0 after one line on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    keys = "images=, test=, annotations=: what data.images, evaluate.data and data.annotations are in a recipe"
    parser.add_argument("photographs", nargs="*", metavar="key=value", help=keys)
    parser.add_argument("--out", type=Path, default=PACKAGE_WEIGHTS, help="where the weights go (default: %(default)s)")
    parser.add_argument("--short", type=int, default=1, metavar="N", help="make all N times shorter, to try it out")
    parser.add_argument("--steps", type=int, help=f"of {BATCH} photographs each (default: {PHOTOGRAPH_STEPS})")
    start = "photographs: begin with weights that this script made, or with none (default: those of the package)"
    parser.add_argument("--start", metavar="FILE", help=start)
    options = parser.parse_intermixed_args(arguments)
    try:
        run(options)
    except InputError as error:
        print(f"toy_teacher: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Train, write the weights and say what they are worth.

    Raises:
        InputError: what is asked for cannot be done; before anything is.
    """
    if options.out.resolve() == PACKAGE_WEIGHTS.resolve() and (options.photographs or options.short > 1):
        what = "photographs make a toy of their own" if options.photographs else "--short is for trying it out"
        raise InputError(f"{what}: say --out FILE.safetensors, so that the package keeps its weights")
    if options.out.suffix != ".safetensors" or not options.out.parent.is_dir():
        raise InputError(f"--out {options.out} is no *.safetensors in a directory that is there")
    if not options.photographs and (options.start is not None or options.steps is not None):
        raise InputError("--start and --steps are for photographs: say images=")
    if options.short < 1 or (options.steps is not None and options.steps < 1):
        raise InputError("--short and --steps take positive numbers")
    accelerator, started = Accelerator(), time.perf_counter()
    course = (
        photograph_course(options, accelerator) if options.photographs else scene_course(options.short, accelerator)
    )
    sam = train(accelerator, course, options.out)
    if accelerator.is_main_process:
        load_toy_state(sam, save_weights(sam, options.out))
        options.out.with_suffix(PARTIAL).unlink(missing_ok=True)
        scores = course.measure(sam, None)
        minutes = (time.perf_counter() - started) / 60
        print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB after {minutes:.0f} min, mIoU {scores}")
    accelerator.wait_for_everyone()


def scene_course(shorter: int, accelerator: Accelerator) -> Course:
    """This process's share of the scenes, and others to measure on."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    scenes = [draw_scene(number) for number in range(rank, SCENES // shorter, ranks)]

    def measured(sam: Sam, count: int | None) -> dict[str, float]:
        return measure(sam, range(count or MEASURED_SCENES // shorter))

    return Course(scenes, augment, measured, PHASES, shorter)


def photograph_course(options: argparse.Namespace, accelerator: Accelerator) -> Course:
    """The photographs that the command line names, and others to measure on.

    Raises:
        InputError: there are none with masks, or the weights to start from are no toy's.
    """
    recipe = toy_photographs.read_settings(options.photographs)
    start = None if options.start == "none" else read_toy_state(options.start or PACKAGE_WEIGHTS)
    steps = options.steps or PHOTOGRAPH_STEPS
    learnt, others = toy_photographs.load_photographs(recipe, accelerator)
    return Course(
        learnt,
        toy_photographs.augment,
        lambda sam, count: score(sam, others[:count]),
        phases=[(TOY_IMAGE_SIZE, steps)],
        shorter=options.short,
        masks=toy_photographs.MASKS,
        warmup=min(WARMUP, max(1, steps // options.short // 10)),
        save_every=SAVE_PHOTOGRAPHS_EVERY,
        dtype=getattr(torch, resolve_dtype("auto", accelerator.device)),
        start=start,
    )


def train(accelerator: Accelerator, course: Course, out: Path) -> Sam:
    """The trained toy at its final image size; every process returns the same weights. Now and then they are saved."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    set_seed(SEED)
    sam = build_toy_sam(course.phases[0][0])
    if course.start is not None:
        load_toy_state(sam, course.start)
    set_seed(SEED + rank)
    rng = np.random.default_rng([SEED, rank])
    total, done = sum(steps for _, steps in course.phases) // course.shorter, 0
    progress = progress_bar(accelerator, "toy teacher", "steps", total=total)
    for size, steps in course.phases:
        smaller, sam = sam, build_toy_sam(size)
        load_toy_state(sam, smaller.state_dict())
        sam.to(accelerator.device).train()
        optimizer = torch.optim.AdamW(parameter_groups(sam, weight_decay=0.05), betas=(0.9, 0.99), fused=True)
        losses: list[float] = []
        for step in range(steps // course.shorter):
            rate = LEARNING_RATE * min(1, (step + 1) / course.warmup) * (1 + math.cos(math.pi * done / total)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            chosen = [
                course.pictures[number] for number in rng.integers(len(course.pictures), size=max(1, BATCH // ranks))
            ]
            batch = [course.augment(picture, size, rng) for picture in chosen]
            losses.append(backward(sam, batch, rng, course.masks, course.dtype))
            average_gradients(sam, accelerator)
            nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            progress.update()
            progress.set_postfix(size=size, loss=f"{fmean(losses[-500:]):.4f}", refresh=False)
            if done % course.save_every == 0 and accelerator.is_main_process:
                save_weights(sam, out.with_suffix(PARTIAL))
                accelerator.print(f"step {done}: mIoU {course.measure(sam, 20)} at {size} px")
                sam.train()
    progress.close()
    return sam


def save_weights(sam: Sam, path: Path) -> dict[str, torch.Tensor]:
    """Write the weights in half precision, and return what was written."""
    state = {name: tensor.cpu().contiguous() for name, tensor in sam.state_dict().items()}
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    with whole_file(path) as temporary:
        temporary.write_bytes(save(halves))
    return halves


def draw_scene(number: int) -> Scene:
    """A training scene at the toy's full size."""
    image, masks = generate_scene(np.random.default_rng([SEED, number]), TOY_IMAGE_SIZE * 5 // 4)
    labels = np.zeros(image.shape[:2], dtype=np.uint8)
    for index, mask in enumerate(masks, start=1):
        labels[mask] = index
    small = resize_longest_side(image, TOY_IMAGE_SIZE)
    size = (small.shape[1], small.shape[0])
    return small, np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))


def augment(scene: Scene, size: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Turned, mirrored and recoloured: encoder input float32 (3, S, S), and some masks, boolean (N, S, S)."""
    image, labels = scene
    turns, mirrored = int(rng.integers(4)), rng.integers(2)
    image, labels = np.rot90(image, turns), np.rot90(labels, turns)
    if mirrored:
        image, labels = image[:, ::-1], labels[:, ::-1]
    pixels = normalize(torch.from_numpy(image[..., rng.permutation(3)].copy()).permute(2, 0, 1))
    if scale := TOY_IMAGE_SIZE // size - 1:
        pixels = F.avg_pool2d(pixels, scale + 1, ceil_mode=True)
        labels = labels[:: scale + 1, :: scale + 1]
    shown = [number for number in range(1, labels.max() + 1) if (labels == number).sum() >= MIN_AREA]
    picked = rng.permutation(shown)[:MASKS].astype(int)
    masks = torch.from_numpy(labels.copy())[None] == torch.from_numpy(picked)[:, None, None]
    padding = (0, size - labels.shape[1], 0, size - labels.shape[0])
    return F.pad(pixels, padding), F.pad(masks, padding)


def measure(sam: Sam, numbers: range) -> dict[str, float]:
    """mIoU with the ground truth by prompt, on scenes of seed 0, measured as stage evaluate does."""
    size = sam.image_encoder.img_size
    scenes = ((n, *generate_scene(np.random.default_rng([0, n]), size * 5 // 4)) for n in numbers)
    samples = (
        Sample(f"sa_{n}", Image.fromarray(image), json.dumps(sa1b_annotation(n, image, masks)))
        for n, image, masks in scenes
    )
    return score(sam, (image for sample in samples if isinstance(image := prepare(sample, size, 95), Prepared)))


def score(sam: Sam, images: Iterable[Prepared]) -> dict[str, float]:
    """mIoU with the ground truth by prompt on annotated images, measured as stage evaluate does."""
    ious: dict[str, list[float]] = {}
    encoder = TeacherEncoder(sam.eval(), sam.device, batch_size=8)
    for row in embedded_rows(encoder, images):
        embedding = torch.from_numpy(row.embedding)[None].float()
        for each in score_image(row, sam, embedding, embedding, make_prompts(row, EvaluateRecipe())):
            assert each.teacher_truth is not None
            ious.setdefault(each.prompt, []).append(each.teacher_truth)
    return {prompt: round(fmean(values), 3) for prompt, values in ious.items()}


if __name__ == "__main__":
    sys.exit(main())
