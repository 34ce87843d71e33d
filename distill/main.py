"""The command line: one recipe, one or all stages."""

import errno
import os
import sys
import time
from contextlib import ExitStack, suppress
from importlib.resources import files
from pathlib import Path

from accelerate import Accelerator

from distill.launch import create_accelerator, refuse_engines, use_all_cores
from distill.recipe import Recipe, describe_keys, list_recipes, load_recipe
from distill.run import claim_run_dir, note_time
from distill.schema import HOLD_BRIEFLY, ON_REQUEST, STAGES
from distill.stages import find_stage
from distill.student import settle_pretrained
from embeddings_cache.system import Stopped, sole_user
from students import CheckFailed, InputError

USAGE = """\
accelerate launch distill.py recipe=NAME [stage=STAGE] [key=value ...]
python distill.py stage=predict run_dir=RUN image=PHOTO [point=x,y] [box=x0,y0,x1,y1]
python distill.py stage=export checkpoint=FILE [export.formats='[onnx, coreml, ...]'] [teacher.checkpoint=FILE]
python distill.py stage=serve run_dir=RUN [host=127.0.0.1] [port=8000]
python distill.py stage=publish run_dir=RUN repo=OWNER/NAME [dry_run=true]

Distil a SAM's image encoder. Runs all stages, each only as far as its result is missing;
the same command goes on after any interruption. `python distill.py` does the same in one process."""

SYSTEM_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE,
    errno.EIO, errno.ESTALE, errno.ENOLCK,
)  # fmt: skip
"""What a disk says that is full, over quota, not ours or gone, and a system that opens no more files."""

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
        if error.errno not in SYSTEM_ERRORS:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"distill.py: {error.strerror}{where}; the same command goes on from here", file=sys.stderr)
        return 2
    except CheckFailed as wrong:
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
        CheckFailed: what a stage made is not as it should be; those after it have run.
    """
    refuse_engines()
    names = STAGES if recipe.stage == "all" else (recipe.stage,)
    for place, name in enumerate(names):
        find_stage(name).check(recipe, before=names[:place])
    accelerator = create_accelerator(recipe)
    use_all_cores(accelerator)
    settle_pretrained(recipe, accelerator, trains="train" in names)
    with ExitStack() as held:
        if accelerator.is_main_process and recipe.stage not in HOLD_BRIEFLY:
            held.enter_context(sole_user(Path(recipe.run_dir)))
            claim_run_dir(recipe)
        accelerator.wait_for_everyone()
        failure: CheckFailed | None = None
        for name in names:
            try:
                run_stage(name, recipe, accelerator)
            except CheckFailed as error:
                if recipe.stage != "all":
                    raise
                failure = error  # a report does without a file that could not be exported
                print(f"distill.py: {failure}", file=sys.stderr)
    accelerator.end_training()
    if failure is not None:
        raise failure


def run_stage(name: str, recipe: Recipe, accelerator: Accelerator) -> None:
    """Run one stage, and note in the run directory how long it took if there was anything to do."""
    zero_shot = name == "evaluate" and recipe.evaluate.task != "masks"
    noted = accelerator.is_main_process and name in STAGES and not zero_shot
    started = time.perf_counter()
    try:
        worked = find_stage(name).run(recipe, accelerator)
    except BaseException:
        with suppress(OSError, InputError):  # what stopped the stage is what has to be said
            if noted:
                note_time(recipe, name, time.perf_counter() - started, finished=False)
        raise
    if noted and worked:
        note_time(recipe, name, time.perf_counter() - started, finished=True)


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
