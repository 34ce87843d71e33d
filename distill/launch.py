"""Accelerate as the stages expect it: devices and processes are the launcher's, the rest is the recipe's."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object, parse_flag_from_env

from distill.recipe import Recipe
from distill.run import begun_recipe
from distill.schema import AUTO
from embeddings_cache.system import available_cores, processes_here
from embeddings_cache.teacher import resolve_dtype
from students import InputError

ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""How `accelerate launch` says what is to divide a model among processes. A student fits into one."""


def refuse_engines() -> None:
    """Raise `InputError` where the launch brings one of `ENGINES`, mostly by Accelerate's default config."""
    for variable, name in ENGINES.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes"):
            raise InputError(
                f"accelerate launch brings {name}, which divides models; students are small and trained whole in each "
                "process: accelerate launch --multi_gpu ..., or a config without it "
                "(--config_file recipes/accelerate/...)"
            )


def create_accelerator(recipe: Recipe) -> Accelerator:
    """This process's part of the launch; settles `train.mixed_precision=auto` in the recipe.

    Raises:
        InputError: the devices cannot do what the recipe's training asks for.
    """
    trains = recipe.stage in ("all", "train")
    was_auto = recipe.train.mixed_precision == AUTO
    settle_precision(recipe, trains)
    # It stays auto where a student lies whose own recipe is not known: then nothing is trained.
    precision = recipe.train.mixed_precision if trains and recipe.train.mixed_precision != AUTO else "no"
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=recipe.train.accumulate,
        log_with=list(recipe.train.trackers),
        project_dir=recipe.run_dir,
        # One process may wait for another's share of the teacher pass for hours; the default gives up after minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    if trains and len(set(gather_object([precision]))) > 1:
        raise InputError("train.mixed_precision=auto: not all GPUs of this launch have bfloat16; say no or fp16")
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("train.mixed_precision=fp16 needs a GPU; on a CPU take bf16 or no")
    if recipe.train.batch_norm == "sync" and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise InputError("train.batch_norm=sync needs GPUs: PyTorch has none for CPUs; take local or frozen")
    if was_auto and precision != "no":
        accelerator.print(f"train.mixed_precision=auto: {precision}")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", precision)
    if launched not in ("no", precision) and trains:
        accelerator.print(f"train.mixed_precision={precision} is the recipe's; the launcher's {launched} is not used")
    return accelerator


def settle_precision(recipe: Recipe, trains: bool) -> None:
    """Put what `train.mixed_precision=auto` comes to into the recipe: what its run began with, or else, if this command
    trains, bf16 on a GPU that has it and no elsewhere."""
    if recipe.train.mixed_precision != AUTO:
        return
    if begun := begun_recipe(recipe):
        recipe.train.mixed_precision = begun.train.mixed_precision
    elif trains:
        on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        dtype = resolve_dtype(AUTO, torch.device("cuda" if on_gpu else "cpu"))
        recipe.train.mixed_precision = "bf16" if dtype == "bfloat16" else "no"


def use_all_cores(accelerator: Accelerator) -> None:
    """On a CPU, share the cores among this machine's processes.

    `accelerate launch` and `torchrun` set one thread a process unless OMP_NUM_THREADS says otherwise.
    """
    launched = {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    threads = os.environ.get("OMP_NUM_THREADS")
    if accelerator.device.type == "cpu" and (threads is None or (launched and threads == "1")):
        torch.set_num_threads(max(1, available_cores() // processes_here()))
