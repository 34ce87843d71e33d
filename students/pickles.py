"""What a pickle would make, told from its instructions, none of which is carried out.

A checkpoint that holds more than tensors is not loaded. Its owner can save the weights alone, and which line of Python
does that depends on where in the file they lie.
"""

import io
import pickletools
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from students.wrappers import LEVELS, WRAPPERS

LARGEST = 1 << 24
"""Bytes of instructions to look at; those of a checkpoint are a few hundred thousand, its tensors lie elsewhere."""

OF_TENSORS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_\w+|torch\.(storage\.)?\w*Storage"
    r"|torch\.(b?float|complex|q?u?int|bool)\w*|torch\.(Size|device)"
)
"""Classes and functions that a state dict is made by."""

TENSOR = "torch._utils._rebuild_"


class Named(str):
    """A class or a function, by its full name."""


@dataclass
class Made:
    """What unpickling would make.

    Attributes:
        by: the class or function that would make it; "" for a dictionary.
        entries: of a dictionary, those whose key is text.
    """

    by: str = ""
    entries: dict[str, Any] = field(default_factory=dict)

    @property
    def is_dict(self) -> bool:
        return self.by in ("", "collections.OrderedDict")


def foreign_names(path: Path) -> list[str]:
    """Classes and functions that loading a checkpoint would call, beside those that make tensors; in the file's order.

    Raises:
        Exception: of any kind, where the file is none that `torch.save` wrote.
    """
    names, _ = read_instructions(_instructions_in(path))
    return [name for name in dict.fromkeys(names) if not OF_TENSORS.fullmatch(name)]


def save_again(path: Path) -> str:
    """Two lines of Python, on one, by which whoever trusts a checkpoint saves its weights alone; they execute the file.

    Raises:
        Exception: as `foreign_names`.
    """
    _, made = read_instructions(_instructions_in(path))
    loaded = f"torch.load({str(path)!r}, map_location='cpu', weights_only=False)"
    return f"import torch; torch.save({_weights_within(made, loaded)}, 'weights.pth')"


def read_instructions(pickled: bytes) -> tuple[list[str], Any]:
    """Go through a pickle's instructions.

    Returns:
        Every class and function that it names, and what would come out: `Made`, or None for numbers and the like.

    Raises:
        Exception: of many kinds, where they are not well-formed.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    named: list[str] = []

    def down_to_mark() -> list[Any]:
        place = marks.pop()
        found = stack[place:]
        del stack[place:]
        return found

    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name == "STOP":
            break
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                argument = f"{stack[-2]} {stack[-1]}"
                del stack[-2:]
            stack.append(Named(str(argument).replace(" ", ".")))
            named.append(stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else int(str(argument))] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(str(argument))])
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else down_to_mark()
            if isinstance(stack[-1], Made):
                pairs = zip(items[::2], items[1::2], strict=True)
                stack[-1].entries.update({key: value for key, value in pairs if type(key) is str})
        elif name in ("REDUCE", "NEWOBJ"):
            stack[-2:] = [Made(str(stack[-2]))]
        elif name == "BUILD":  # the state goes into what stands below it
            stack.pop()
        elif name == "EMPTY_DICT":
            stack.append(Made())
        else:
            before = opcode.stack_before
            if pickletools.markobject in before:
                down_to_mark()
                before = before[: before.index(pickletools.markobject)]
            del stack[len(stack) - len(before) :]
            stack += [argument if type(argument) is str else None] * len(opcode.stack_after)
    return named, stack[-1]


def _weights_within(made: Any, expression: str) -> str:
    """An expression for the state dict in `made`, given one for `made`."""
    for _ in range(LEVELS):
        if not isinstance(made, Made) or not made.is_dict:
            break
        inner = _wrapper(made)
        if inner is None:
            break
        made, expression = made.entries[inner], f"{expression}[{inner!r}]"
    if isinstance(made, Made) and not made.is_dict:
        return f"{expression}.state_dict()"
    if isinstance(made, Made) and all(map(_is_tensor, made.entries.values())):
        return expression
    return f"{{name: value for name, value in {expression}.items() if torch.is_tensor(value)}}"


def _wrapper(made: Made) -> str | None:
    """The entry of a dictionary that has the weights; None where they are its own."""
    inner = [name for name, entry in made.entries.items() if isinstance(entry, Made) and not _is_tensor(entry)]
    known = [name for name in WRAPPERS if name in inner]
    if known or any(map(_is_tensor, made.entries.values())):
        return known[0] if known else None
    dicts = [name for name in inner if made.entries[name].is_dict]
    of_tensors = [name for name in dicts if any(_is_tensor(entry) for entry in made.entries[name].entries.values())]
    return of_tensors[0] if len(of_tensors) == 1 else None


def _is_tensor(made: Any) -> bool:
    return isinstance(made, Made) and made.by.startswith(TENSOR)


def _instructions_in(path: Path) -> bytes:
    """Of the pickle in what `torch.save` wrote, today's zip or the older format."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            (member,) = (info for info in archive.infolist() if info.filename.endswith("data.pkl"))
            if member.file_size > LARGEST:
                raise ValueError(f"{member.file_size} bytes of instructions")
            return archive.read(member)
    with path.open("rb") as file:
        start = io.BytesIO(file.read(LARGEST))
    for _ in range(3):  # a magic number, a version and what machine it was
        for _ in pickletools.genops(start):
            pass
    return start.read()
