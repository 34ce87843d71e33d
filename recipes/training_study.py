"""What ways to train and necks are worth: `python -m recipes.training_study` makes the table of docs/training.md,
`--study students` that of docs/students.md.

The quickstart, each variant with a few seeds, and no other difference: the same scenes, held-out scenes and teacher,
and the same number of epochs, or, of students, as many as take equally long. What is there already is not run again.
About an hour with `--jobs 2` on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

from embeddings_cache.system import available_cores

TRAINING: dict[str, list[str]] = {
    "`mse`": ["train.ignore_padding=false"],
    "`mse`, `train.ignore_padding=true`": ["train.ignore_padding=true"],
    "`mse`, `train.ema=0.999`": ["train.ignore_padding=false", "train.ema=0.999"],
    "`mse`, the last 2 of 8 epochs with `mask: 0.1`": [
        "train.ignore_padding=false",
        "train.epochs=6",
        "train.then=[{epochs: 2, loss: {mse: 1.0, mask: 0.1}}]",
        "train.mask_prompts=4",
    ],
    "`mse`, `student.downsample=fuse`": ["train.ignore_padding=false", "student.downsample=fuse"],
}

STUDENTS: dict[str, list[str]] = {
    "`neck: sam`": ["train.epochs=8"],
    "`neck: pyramid`": ["student.neck=pyramid", "train.epochs=7"],
    "`neck: pyramid`, `input_size: 128`": ["student.neck=pyramid", "student.input_size=128", "train.epochs=11"],
}
"""An epoch of theirs takes 1, 1.13 and 0.69 times as long, on two cores."""

STUDIES = {"training": TRAINING, "students": STUDENTS}


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

    def run(stage: str, number: int, seed: int) -> None:
        keys = [f"stage={stage}", f"seed={seed}", f"run_dir={out / f'{number}-{seed}'}"]
        command = [sys.executable, "distill.py", "recipe=quickstart", *keys, *options.settings]
        subprocess.run([*command, *list(variants.values())[number]], env=environment, check=True)

    run("precompute", 0, 0)  # all variants share the cache
    with ThreadPoolExecutor(options.jobs) as pool:
        for stage in ("train", "evaluate"):
            runs = product(range(options.seeds), range(len(variants)))
            list(pool.map(lambda seed_number, stage=stage: run(stage, seed_number[1], seed_number[0]), runs))
    found = [[result(out / f"{number}-{seed}") for seed in range(options.seeds)] for number in range(len(variants))]
    print(table(dict(zip(variants, found, strict=True))))


def result(run_dir: Path) -> dict[str, float]:
    """What a run came to."""
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    miou = evaluation["miou"]
    return {
        "embedding MSE": evaluation["embedding"]["mse"],
        **{f"{prompt}, teacher": miou[prompt]["all"]["student_teacher"] for prompt in ("point", "box")},
        **{f"{prompt}, truth": miou[prompt]["all"]["student_truth"] for prompt in ("point", "box")},
        "minutes": json.loads((run_dir / "stages.json").read_text())["train"]["seconds"] / 60,
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
