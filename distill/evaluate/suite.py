"""Zero-shot tasks: every contestant on every item of a data set, and one table of all of them.

Numbers do not depend on the number of processes: each keeps what it measured, and one reads it all in the order of the
items. A run that was interrupted goes on, and a contestant that comes later is measured alone.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from accelerate import Accelerator
from segment_anything.modeling import Sam

from distill.evaluate.contestants import Contestant, contestants_of, load_contestant, load_decoder
from distill.evaluate.decoding import Segmenter
from distill.evaluate.kept import RESULT, SKIPPED, Kept, Stamp
from distill.recipe import Recipe
from distill.run import is_current, read_section, write_section
from distill.schema import TEACHER
from embeddings_cache.images import commonest
from embeddings_cache.system import map_ahead, progress_bar
from students import InputError

AT_ONCE = 2
"""Items in hand, a process: what is done by one core on an item goes on while a GPU or the others decode another's."""


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


def check_task(recipe: Recipe) -> None:
    """Raise `InputError` where the task cannot be done: data, contestants or a library are missing."""
    contestants_of(recipe)
    find_task(recipe.evaluate.task).find(recipe)


def evaluate_task(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Measure all contestants; write the task's section of `evaluation.json`, and show it as a table.

    Returns:
        False where it was there.

    Raises:
        InputError: a contestant cannot be had, or no item could be measured.
    """
    name = recipe.evaluate.task
    task, contestants = find_task(name), contestants_of(recipe)
    items = task.find(recipe)[: recipe.evaluate.limit]
    settings = {"task": name, "data": recipe.evaluate.data, **task.settings(recipe)}
    depends = {each.name: {**settings, "contestant": each.inputs(recipe)} for each in contestants}
    inputs = {"contestants": depends, "items": _digest([(item.key, stamp(item)) for item in items])}
    result = Path(recipe.run_dir) / "evaluation.json"
    if is_current(result, inputs, accelerator, section=name):
        accelerator.print(as_table(read_section(result, name) or {}))
        return False
    folder = Path(recipe.run_dir) / "evaluation" / name
    kept = {each.name: Kept(folder, each.name, _digest(depends[each.name])) for each in contestants}
    teacher: Sam | None = None
    for each in contestants:
        lines = kept[each.name].read()
        accelerator.wait_for_everyone()  # nobody adds to what another still reads
        left = [item for item in items if RESULT not in lines.get((item.key, stamp(item)), {})]
        if not left:
            continue
        teacher = teacher or load_decoder(recipe, accelerator.device)
        measure_contestant(task, recipe, accelerator, each, teacher, left, kept[each.name])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        content = {**gather(task, recipe, items, kept), "made_from": inputs}
        write_section(result, name, content)
        print(as_table(content))
    accelerator.wait_for_everyone()
    return True


def measure_contestant(
    task: Task,
    recipe: Recipe,
    accelerator: Accelerator,
    contestant: Contestant,
    teacher: Sam,
    items: Sequence[Any],
    kept: Kept,
) -> None:
    """Measure this process's share of some items, and keep what comes of each."""
    sam = load_contestant(contestant, recipe, teacher)
    segmenter = Segmenter(sam, accelerator.device, recipe.teacher.dtype if contestant.path is None else "float32")
    mine = items[accelerator.process_index :: accelerator.num_processes]

    def measure(item: Any) -> dict[str, Any]:
        try:
            return {RESULT: task.measure(item, segmenter, recipe, kept.pictures)}
        except InputError as error:
            return {SKIPPED: str(error)}

    with (
        kept.keeper(accelerator.process_index) as keep,
        progress_bar(accelerator, f"{recipe.evaluate.task}: {contestant.name}", task.UNIT, total=len(mine)) as progress,
        closing(map_ahead(measure, mine, AT_ONCE, ahead=2 * AT_ONCE)) as lines,
    ):
        for item, line in zip(mine, lines, strict=True):
            keep(item.key, stamp(item), **line)
            progress.update()


def gather(task: Task, recipe: Recipe, items: Sequence[Any], kept: Mapping[str, Kept]) -> dict[str, Any]:
    """A task's section: each contestant's numbers, and what share of the teacher's each is, where it takes part.

    Raises:
        InputError: of some contestant no item could be measured.
    """
    results: dict[str, Any] = {}
    for name, each in kept.items():
        lines = each.read()
        now = {item.key: lines.get((item.key, stamp(item)), {SKIPPED: "changed meanwhile"}) for item in items}
        measured = {key: line[RESULT] for key, line in now.items() if RESULT in line}
        skipped = {key: line[SKIPPED] for key, line in now.items() if RESULT not in line}
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
    return {"task": recipe.evaluate.task, "unit": task.UNIT, "columns": list(task.COLUMNS), "results": results}


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
        line += f"   {numbers[unit]} {unit}"
        if skipped := numbers["skipped"]:
            line += f", {len(skipped)} skipped: {commonest([*skipped.items()])}"
        lines.append(line + (f"; {numbers['note']}" if "note" in numbers else ""))
        if shared and name != TEACHER:
            shares = numbers["of_the_teachers"]
            told = [f"{shares[column]:.1%}" if column in shares else "–" for column in columns]
            lines.append(f"{'  of the teacher’s':<{width}}" + "".join(f"{value:>{cells}}" for value in told))
    return "\n".join(lines)


def stamp(item: Item) -> Stamp:
    """Sizes of an item's files, to tell a changed one by; None for one that is missing."""
    return tuple(path.stat().st_size if path.exists() else None for path in item.files)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
