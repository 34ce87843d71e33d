"""Zero-shot tasks: every contestant on every item of a data set, and one table of all of them.

Numbers do not depend on the number of processes: each keeps what it measured, and one reads it all in the order of the
items. A run that was interrupted goes on, and a contestant that comes later is measured alone.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from segment_anything.modeling import Sam

from distill.evaluate.contestants import Contestant, contestants_of, load_contestant, load_decoder
from distill.evaluate.decoding import Segmenter
from distill.evaluate.kept import RESULT, SKIPPED, Kept, Place
from distill.reading import reading_of
from distill.recipe import Recipe
from distill.run import is_current, read_section, write_section
from distill.schema import TEACHER
from embeddings_cache.images import commonest
from embeddings_cache.system import map_ahead, progress_bar
from students import InputError

AT_ONCE = 2
"""Items in hand, a process: what is done by one core on an item goes on while a GPU or the others decode another's."""


ENDS = 2**16
"""Bytes of a file at either end that are looked at to tell whether it has changed."""


class Item(Protocol):
    """What is measured at a time, mostly an image: a key that no other has, and the files that it is read from."""

    @property
    def key(self) -> str: ...

    @property
    def files(self) -> Sequence[Path]: ...


class Task(Protocol):
    """What the module of every task has.

    Attributes:
        COLUMNS: which of the numbers of `summarize` a table shows.
        UNIT: what items are called.
    """

    COLUMNS: Sequence[str]
    UNIT: str

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """What of a recipe the result of an item depends on, beside the contestant and the item's files."""

    def find(self, recipe: Recipe) -> Sequence[Any]:
        """The items of `evaluate.data`, in order.

        Raises:
            InputError: the data are not there, or not laid out as they officially are.
        """

    def measure(self, item: Any, segmenter: Segmenter, recipe: Recipe, pictures: Path) -> dict[str, Any]:
        """What comes of an item, for JSON; what can be looked at goes to the folder `pictures`.

        Raises:
            InputError: the item is bad. It is skipped and counted.
        """

    def summarize(self, results: Mapping[str, dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
        """A contestant's numbers, of what came of its items, by key and in order."""


def find_task(name: str) -> Task:
    """The task of a name.

    Raises:
        InputError: a library that it needs is not installed.
    """
    try:
        return cast(Task, import_module(f"distill.evaluate.{name}"))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("distill"):
            raise
        raise InputError(
            f"evaluate.task={name} needs {error.name}: pip install 'sam-distill[evaluate]', or .[evaluate] from source"
        ) from error


def check_task(recipe: Recipe) -> bool:
    """Raise `InputError` where the task cannot be done: data, contestants or a library are missing.

    Returns:
        Whether it takes the recipe's teacher.
    """
    find_task(recipe.evaluate.task).find(recipe)
    return any(each.in_decoder() for each in contestants_of(recipe))


def evaluate_task(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Measure all contestants; write the task's section of `evaluation.json`, and show it as a table.

    Returns:
        False where it was there.

    Raises:
        InputError: a contestant cannot be had, or no item could be measured.
    """
    name = recipe.evaluate.task
    task, contestants = find_task(name), contestants_of(recipe)
    items = {(item.key, stamp(item)): item for item in task.find(recipe)[: recipe.evaluate.limit]}
    reading = vars(reading_of(recipe))
    settings = {"task": name, "data": recipe.evaluate.data, "reading": reading, **task.settings(recipe)}
    depends = {each.name: {**settings, "contestant": each.inputs(recipe)} for each in contestants}
    inputs = {"contestants": depends, "items": _digest([*items])}
    result = Path(recipe.run_dir) / "evaluation.json"
    earlier = read_section(result, name) or {"results": {}}
    whole = not any(numbers["skipped"] for numbers in earlier["results"].values())  # what was bad may be good by now
    if whole and is_current(result, inputs, accelerator, section=name):
        accelerator.print(as_table(earlier))
        return False
    folder = Path(recipe.run_dir) / "evaluation" / name
    kept = {each.name: Kept(folder, each.name, _digest(depends[each.name])) for each in contestants}
    teacher: Sam | None = None
    for each in contestants:
        done = kept[each.name].measured()
        accelerator.wait_for_everyone()  # nobody adds to what another still reads
        left = {place: item for place, item in items.items() if place not in done}
        if not left:
            continue
        if each.in_decoder():
            teacher = teacher or load_decoder(recipe, accelerator.device)
        measure_contestant(task, recipe, accelerator, each, teacher, left, kept[each.name])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        content = {**gather(task, recipe, [*items], kept), "made_from": inputs}
        content["checkpoints"] = {each.name: str(each.path) for each in contestants if each.path is not None}
        write_section(result, name, content)
        print(as_table(content))
    accelerator.wait_for_everyone()
    return True


def measure_contestant(
    task: Task,
    recipe: Recipe,
    accelerator: Accelerator,
    contestant: Contestant,
    teacher: Sam | None,
    items: Mapping[Place, Any],
    kept: Kept,
) -> None:
    """Measure this process's share of some items, and keep what comes of each."""
    segmenter = Segmenter(load_contestant(contestant, teacher), accelerator.device, contestant.dtype(recipe))
    mine = [*items.items()][accelerator.process_index :: accelerator.num_processes]

    def measure(item: Any) -> dict[str, Any]:
        try:
            return {RESULT: task.measure(item, segmenter, recipe, kept.pictures)}
        except InputError as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                raise  # the device is to blame, and not the item
            return {SKIPPED: str(error).removeprefix(f"{item.files[0]}: ")}  # the key says which; many have one reason

    with (
        kept.keeper(accelerator.process_index) as keep,
        progress_bar(accelerator, f"{recipe.evaluate.task}: {contestant.name}", task.UNIT, total=len(mine)) as progress,
        closing(map_ahead(measure, [item for _, item in mine], AT_ONCE, ahead=2 * AT_ONCE)) as lines,
    ):
        for (place, _), line in zip(mine, lines, strict=True):
            keep(*place, **line)
            progress.update()


def gather(task: Task, recipe: Recipe, items: Sequence[Place], kept: Mapping[str, Kept]) -> dict[str, Any]:
    """A task's section: each contestant's numbers, and what share of the teacher's each is, where it takes part.

    Raises:
        InputError: of some contestant no item could be measured.
    """
    results: dict[str, Any] = {}
    for name, each in kept.items():
        lines = each.read()
        measured = {place[0]: lines[place][RESULT] for place in items if RESULT in lines[place]}
        skipped = {place[0]: lines[place][SKIPPED] for place in items if RESULT not in lines[place]}
        if not measured:
            raise InputError(f"{recipe.evaluate.task}: nothing could be measured {commonest([*skipped.items()])}")
        numbers = task.summarize(measured, recipe)
        results[name] = {**numbers, task.UNIT: len(measured), "skipped": skipped}
    if TEACHER in results:
        for numbers in results.values():
            numbers["of_the_teachers"] = {
                column: numbers[column] / results[TEACHER][column]
                for column in task.COLUMNS
                if numbers[column] is not None and results[TEACHER][column]
            }
    shown = {"task": recipe.evaluate.task, "unit": task.UNIT, "columns": list(task.COLUMNS)}
    return {**shown, "limit": recipe.evaluate.limit, "results": results}


def as_table(section: dict[str, Any]) -> str:
    """A section for the terminal: a line a contestant."""
    results, columns, unit = section["results"], section["columns"], section["unit"]
    width = max(len(name) for name in results) + 2
    cells = max(12, *(len(column) + 2 for column in columns))
    shared = any(len(numbers.get("of_the_teachers", {})) for name, numbers in results.items() if name != TEACHER)
    lines = [f"{section['task']:<{width}}" + "".join(f"{column:>{cells}}" for column in columns)]
    for name, numbers in results.items():
        shown = ["–" if numbers[column] is None else f"{numbers[column]:.4f}" for column in columns]
        line = f"{name:<{width}}" + "".join(f"{value:>{cells}}" for value in shown)
        line += f"   {numbers[unit]} {unit}" + (f" (evaluate.limit={section['limit']})" if section["limit"] else "")
        if skipped := numbers["skipped"]:
            line += f", {len(skipped)} skipped: {commonest([*skipped.items()])}"
        lines.append(line + (f"; {numbers['note']}" if "note" in numbers else ""))
        if shared and name != TEACHER:
            shares = numbers["of_the_teachers"]
            told = [f"{shares[column]:.1%}" if column in shares else "–" for column in columns]
            lines.append(f"{'  of the teacher’s':<{width}}" + "".join(f"{value:>{cells}}" for value in told))
    return "\n".join(lines)


def stamp(item: Item) -> str:
    """What tells a changed item from the one that was measured: a digest of its files' sizes and ends."""
    digest = hashlib.sha256()
    for path in item.files:
        if path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.stat().st_size} ".encode() + file.read(ENDS))
                file.seek(-min(ENDS, path.stat().st_size), os.SEEK_END)
                digest.update(file.read(ENDS))
        digest.update(b"|")
    return digest.hexdigest()[:12]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
