"""The command line: one recipe, one or all stages."""

import errno
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from importlib.resources import files
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from distill.cache_stages import run_precompute, run_verify
from distill.evaluate.masks import evaluate_masks
from distill.export.proof import ParityError
from distill.export.published import convert
from distill.export.stage import export
from distill.export.subject import check_formats
from distill.predict import predict, prompts_within, read_photograph
from distill.recipe import STAGES, Recipe, describe_keys, list_recipes, load_recipe
from distill.report import report
from distill.run import (
    chosen_student,
    claim_run_dir,
    note_time,
    open_cache,
    refuse_other_settings,
    trained_student,
)
from distill.schema import ON_REQUEST
from distill.train import student_config, train
from distill.training.metrics import check_trackers
from distill.training.plan import check_batch, wants_masks
from embeddings_cache.files import sole_user
from embeddings_cache.format import read_info
from embeddings_cache.overlap import available_cores, processes_here
from embeddings_cache.scenes import scene_count
from embeddings_cache.sources import expand_sources, pick_sources
from embeddings_cache.stopping import Stopped
from embeddings_cache.teacher import check_teacher
from embeddings_cache.verify import DamagedCache
from students import InputError, build_encoder, identify

USAGE = """\
accelerate launch distill.py recipe=NAME [stage=STAGE] [key=value ...]
python distill.py stage=predict run_dir=RUN image=PHOTO [point=x,y] [box=x0,y0,x1,y1]
python distill.py stage=export checkpoint=FILE [export.formats='[onnx, coreml, ...]'] [teacher.checkpoint=FILE]

Distil a SAM's image encoder. Runs all stages, each only as far as its result is missing;
the same command goes on after any interruption. `python distill.py` does the same in one process."""

REAL_RUN = """\
These were generated scenes and a teacher that knows nothing else; a real run takes photographs and a SAM checkpoint: \
accelerate launch distill.py recipe=repvit_m2_3 teacher.checkpoint=sam_vit_h_4b8939.pth \
data.images='TARS OR FOLDER' data.fraction=1.0"""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""What a disk says that is full, over quota, or not ours to write to."""

OTHERS_WAIT = 5.0
"""Seconds that a process other than the main one waits before it reports what stopped it."""


def main(arguments: list[str]) -> int:
    """Run what the command line asks for; returns the exit code, not 0 after one line on stderr."""
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        print(help_text())
        return 0
    rank = int(os.environ.get("RANK", "0"))
    try:
        run(load_recipe(arguments))
    except InputError as error:
        if rank:
            # What stops every process is said once: the main process says it and the launcher ends the others.
            time.sleep(OTHERS_WAIT)
        print(f"distill.py: {f'process {rank}: ' if rank else ''}{error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"distill.py: {error.strerror}{where}; the same command goes on from here", file=sys.stderr)
        return 2
    except (DamagedCache, ParityError) as wrong:
        print(f"distill.py: {wrong}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if not rank:  # all of them are told to stop
            print(f"distill.py: {stopped}; the same command goes on from here", file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        print("distill.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def run(recipe: Recipe) -> None:
    """Run the recipe's stage, or all of them.

    Raises:
        InputError: whatever the recipe asks for cannot be done. What can be checked is checked before anything is
            written.
    """
    stages = STAGES if recipe.stage == "all" else (recipe.stage,)
    check_inputs(recipe, stages)
    accelerator = create_accelerator(recipe)
    use_all_cores(accelerator)
    with ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(sole_user(Path(recipe.run_dir)))
            claim_run_dir(recipe)
        accelerator.wait_for_everyone()
        for stage in stages:
            run_stage(stage, recipe, accelerator)
    if stages == STAGES and recipe.name == "quickstart" and scene_count(recipe.data.images):
        accelerator.print(REAL_RUN)
    accelerator.end_training()


def run_stage(stage: str, recipe: Recipe, accelerator: Accelerator) -> None:
    """Run one stage, and note in the run directory how long it took if there was anything to do."""
    functions: dict[str, Callable[[Recipe, Accelerator], bool]] = {
        "precompute": run_precompute,
        "train": train,
        "evaluate": evaluate_masks,
        "export": export,
        "report": report,
        "predict": predict,
        "verify": run_verify,
        "convert": convert,
    }
    noted = accelerator.is_main_process and stage in STAGES
    started = time.perf_counter()
    try:
        worked = functions[stage](recipe, accelerator)
    except BaseException:
        with suppress(OSError, InputError):  # what stopped the stage is what has to be said
            if noted:
                note_time(recipe, stage, time.perf_counter() - started, finished=False)
        raise
    if noted and worked:
        note_time(recipe, stage, time.perf_counter() - started, finished=True)


def create_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate as the stages expect it: devices and processes are the launcher's, the rest is the recipe's."""
    precision = recipe.train.mixed_precision if recipe.stage in ("all", "train") else "no"
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=recipe.train.accumulate,
        log_with=list(recipe.train.trackers),
        project_dir=recipe.run_dir,
        # One process may wait for another's share of the teacher pass for hours; the default gives up after minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("train.mixed_precision=fp16 needs a GPU; on a CPU take bf16 or no")
    if recipe.train.batch_norm == "sync" and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise InputError("train.batch_norm=sync needs GPUs: PyTorch has none for CPUs; take local or frozen")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", precision)
    if launched not in ("no", precision) and recipe.stage in ("all", "train"):
        accelerator.print(f"train.mixed_precision={precision} is the recipe's; the launcher's {launched} is not used")
    return accelerator


def use_all_cores(accelerator: Accelerator) -> None:
    """On a CPU, share the cores among this machine's processes.

    `accelerate launch` and `torchrun` set one thread a process unless OMP_NUM_THREADS says otherwise.
    """
    launched = {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    threads = os.environ.get("OMP_NUM_THREADS")
    if accelerator.device.type == "cpu" and (threads is None or (launched and threads == "1")):
        torch.set_num_threads(max(1, available_cores() // processes_here()))


def check_inputs(recipe: Recipe, stages: tuple[str, ...]) -> None:
    """Refuse what is known to fail, before anything is written.

    Raises:
        InputError: something that a stage needs is missing, or does not fit.
    """
    if {"precompute", "evaluate", "report", "predict", "convert"} & set(stages) or (
        "verify" in stages and recipe.verify.recompute
    ):
        check_teacher(recipe.teacher.name, recipe.teacher.checkpoint, recipe.image_size)
    asked = {"evaluate", "report", "predict", "convert"} & set(stages)
    if asked and recipe.teacher.checkpoint and not identify(Path(recipe.teacher.checkpoint))[1]:
        raise InputError(
            f"{recipe.teacher.checkpoint} holds an image encoder alone: it can teach (stage=precompute, train, "
            "export), but masks need a decoder"
        )
    if recipe.cache.per_node and "precompute" in stages:
        raise InputError(
            "cache.per_node=true takes shards that are there: stage=train, and others with a whole cache.dir"
        )
    info = read_info(Path(recipe.cache.dir))
    if info is not None and info.complete and {"precompute", "train"} & set(stages):
        refuse_other_settings(recipe, info.identity)
    if "precompute" in stages and not scene_count(recipe.data.images) and (info is None or not info.complete):
        pick_sources(expand_sources(recipe.data.images), recipe.data.fraction)
    if "train" in stages and not trained_student(recipe).exists():
        check_batch(recipe, int(os.environ.get("WORLD_SIZE", "1")))
        check_trackers(recipe)
        if wants_masks(recipe):
            check_teacher(recipe.teacher.name, recipe.teacher.checkpoint, recipe.image_size)
        pretrained = recipe.student.pretrained
        build_encoder(student_config(recipe), pretrained if isinstance(pretrained, str) else False)
        if "precompute" not in stages:
            open_cache(recipe, partly=recipe.cache.per_node)
    if "export" in stages:
        check_formats(recipe)
    if "predict" in stages:
        prompts_within(recipe, read_photograph(recipe))
    if {"evaluate", "export", "report", "predict", "convert"} & set(stages):
        if recipe.checkpoint is not None or "train" not in stages:
            chosen_student(recipe)
        if recipe.evaluate.data is not None and "evaluate" in stages:
            pick_sources(expand_sources(recipe.evaluate.data), 1.0)


def help_text() -> str:
    """Usage, recipes, stages, and every key with default and comment."""
    lines = [USAGE, "", "recipes (or the path of a YAML file):"]
    for name in list_recipes():
        text = (files("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
        lines.append(f"  {name:<14} {text.splitlines()[0].removeprefix('# ')}")
    lines += [
        "",
        f"stages: {', '.join(STAGES)}; on request: {', '.join(ON_REQUEST)}",
        "",
        "keys, their defaults and what they are:",
    ]
    lines += [f"  {key + '=' + default:<44} {comment}" for key, default, comment in describe_keys()]
    return "\n".join(lines)
