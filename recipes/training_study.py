"""What ways to train and necks are worth: `python -m recipes.training_study` makes the table of docs/training.md,
`--study students` that of docs/students.md; `masks` and `embeddings` compare last phases, and losses and batches.

The quickstart, each variant with a few seeds, and no other difference: same scenes, held-out scenes and teacher. What
ends in masks goes on from one and the same student for each seed. What is there already is not run again. A study takes
one to two hours with `--jobs 2` on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

from embeddings_cache.system import available_cores


@dataclass(frozen=True)
class Variant:
    """What the command line says, and the variant whose student it goes on from."""

    settings: tuple[str, ...]
    after: str | None = None


def then(loss: str, *more: str) -> Variant:
    """One epoch more, with a schedule of its own."""
    said = ["epochs: 1", f"loss: {{{loss}}}", "lr: 0.0003", "lr_end: 0.00001", "warmup_steps: 10", "mask_prompts: 4"]
    return Variant(("train.epochs=0", f"train.then=[{{{', '.join([*said, *more])}}}]"), FIRST)


TRAINING: dict[str, Variant] = {
    "`mse`": Variant(("train.ignore_padding=false",)),
    "`mse`, `train.ignore_padding=true`": Variant(("train.ignore_padding=true",)),
    "`mse`, `train.ema=0.999`": Variant(("train.ignore_padding=false", "train.ema=0.999")),
    "`mse`, the last 2 of 8 epochs with `mask: 0.1`": Variant(
        (
            "train.ignore_padding=false",
            "train.epochs=6",
            "train.then=[{epochs: 2, loss: {mse: 1.0, mask: 0.1}}]",
            "train.mask_prompts=4",
        )
    ),
    "`mse`, `student.downsample=fuse`": Variant(("train.ignore_padding=false", "student.downsample=fuse")),
}

FIRST = "5 epochs of `mse`"
BOTH = "mask_bce: 5, mask_dice: 5"

MASKS: dict[str, Variant] = {
    FIRST: Variant(("train.epochs=5",)),
    "6 epochs of `mse`": Variant(("train.epochs=6",)),
    "8 epochs of `mse`": Variant(("train.epochs=8",)),
    "5, then 1 of masks, soft": then(BOTH),
    "5, then 1 of masks, binary": then(BOTH, "mask_targets: binary"),
    "5, then 1 of masks, soft, 2 rounds": then(BOTH, "mask_rounds: 2"),
    "5, then 1 of `mse` and masks, soft": then("mse: 1, mask: 0.1"),
    "5, then 1 of `truth`": then("truth: 1"),
}
"""An epoch of masks takes as long as two to three of `mse`: five and one are six in epochs and about eight in time."""

EMBEDDINGS: dict[str, Variant] = {
    "`mse`": Variant(()),
    "`l1`": Variant(("train.loss={l1: 1}",)),
    "`huber`": Variant(("train.loss={huber: 1}",)),
    "`mse` and `cosine`": Variant(("train.loss={mse: 1, cosine: 1}",)),
    "`mse`, batch 8, rate × 2": Variant(("train.lr_per=4", "train.batch_size=8")),
    "`mse`, batch 16, rate × 4": Variant(("train.lr_per=4", "train.batch_size=16")),
    "`mse`, batch 32, rate × 8": Variant(("train.lr_per=4", "train.batch_size=32")),
}

STUDENTS: dict[str, Variant] = {
    "`neck: sam`": Variant(("train.epochs=8",)),
    "`neck: pyramid`": Variant(("student.neck=pyramid", "train.epochs=7")),
    "`neck: pyramid`, `input_size: 128`": Variant(
        ("student.neck=pyramid", "student.input_size=128", "train.epochs=11")
    ),
}
"""An epoch of theirs takes 1, 1.13 and 0.69 times as long, on two cores."""

STUDIES = {"training": TRAINING, "masks": MASKS, "embeddings": EMBEDDINGS, "students": STUDENTS}


def main() -> None:
    """Run what is missing, seed by seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="training", help="what is compared")
    parser.add_argument("--out", type=Path, help="where the runs go; default: runs/STUDY-study")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("settings", nargs="*", help="key=value for every run, as for distill.py")
    options = parser.parse_args()
    variants, out = STUDIES[options.study], options.out or Path(f"runs/{options.study}-study")
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, available_cores() // options.jobs))}

    def run(stage: str, name: str, seed: int) -> None:
        variant = variants[name]
        keys = [f"stage={stage}", f"seed={seed}", f"run_dir={place(out, variants, name, seed)}"]
        keys += ["train.loss={mse: 1}", *variant.settings]  # where a variant says no other
        if variant.after is not None:
            keys.append(f"student.start={place(out, variants, variant.after, seed) / 'student.safetensors'}")
        command = [sys.executable, "distill.py", "recipe=quickstart", *options.settings, *keys]
        subprocess.run(command, env=environment, check=True)

    names = list(variants)
    first = [name for name in names if variants[name].after is None]
    run("precompute", first[0], 0)  # all variants share the cache
    with ThreadPoolExecutor(options.jobs) as pool:
        for stage, some in (
            ("train", first),
            ("train", [name for name in names if name not in first]),
            ("evaluate", names),
        ):
            list(pool.map(lambda task, stage=stage: run(stage, task[1], task[0]), product(range(options.seeds), some)))
    print(table({name: [result(out, variants, name, seed) for seed in range(options.seeds)] for name in names}))


def place(out: Path, variants: Mapping[str, Variant], name: str, seed: int) -> Path:
    """A variant's run directory."""
    return out / f"{list(variants).index(name)}-{seed}"


def result(out: Path, variants: Mapping[str, Variant], name: str, seed: int) -> dict[str, float]:
    """What a run came to; its minutes include those of the one that it goes on from."""
    run_dir, after = place(out, variants, name, seed), variants[name].after
    evaluation = json.loads((run_dir / "evaluation.json").read_text())["masks"]
    means = {prompt: evaluation["miou"][prompt]["all"] for prompt in ("point", "box")}
    minutes = json.loads((run_dir / "stages.json").read_text())["train"]["seconds"] / 60
    return {
        "embedding MSE": evaluation["embedding"]["mse"],
        **{f"{prompt}, teacher": mean["student_teacher"] for prompt, mean in means.items()},
        **{f"{prompt}, truth": mean["student_truth"] for prompt, mean in means.items()},
        **{
            f"{prompt}, student ÷ teacher": mean["student_truth"] / mean["teacher_truth"]
            for prompt, mean in means.items()
        },
        "minutes": minutes + (result(out, variants, after, seed)["minutes"] if after is not None else 0),
    }


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean ± standard deviation over seeds, a line a variant."""
    columns = list(next(iter(results.values()))[0])
    lines = ["| " + " | ".join(["trained with", *columns]) + " |", "| --- |" + " --- |" * len(columns)]
    for name, runs in results.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs]
            digits = {"minutes": 1, "embedding MSE": 4}.get(column, 3)
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.{digits}f}{spread}")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
