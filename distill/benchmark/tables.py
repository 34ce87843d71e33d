"""Benchmarks as tables: on the terminal, and as Markdown."""

import re
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]

NOT_SHOWN = ("reason", "stable", "ratio_low", "ratio_high")
"""Keys of rows that tables leave out or show with another; lists, which hold raw samples, they leave out too."""


def plain_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A column for each key of the rows, the header first."""
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if _is_shown(key, value)))
    return [columns, *([_cell(row, column) for column in columns] for row in rows)]


def students_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """What people ask of students, a column each, the header first; what is missing says why."""
    return [list(COLUMNS), *([cell(row) for cell in COLUMNS.values()] for row in rows)]


def changes_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """What `compare` found, the header first."""
    header = ["benchmark", "contender", "backend", "before ms", "after ms", "change", "verdict", "else"]
    return [header, *(_change(row) for row in rows)]


def published_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Latencies that others published."""
    header = ["published", "device", "ms", "source"]
    return [header, *([row["name"], row["device"], _number(row["ms"]) or row["reason"], row["source"]] for row in rows)]


def as_text(cells: list[list[str]]) -> str:
    """Aligned columns."""
    widths = [max(len(line[place]) for line in cells) for place in range(len(cells[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def as_markdown(cells: list[list[str]]) -> str:
    """A Markdown table."""
    header, *lines = [["| " + " | ".join(re.sub(r"([|\\])", r"\\\1", cell) for cell in line) + " |"] for line in cells]
    rule = "| " + " | ".join("---" for _ in cells[0]) + " |"
    return "\n".join([header[0], rule, *(line[0] for line in lines)])


def describe_machine(machine: Row) -> str:
    """What the numbers were measured on, in a line."""
    words = [machine["device"], f"{machine['threads']} threads", f"torch {machine['torch']}", machine["system"]]
    return ", ".join([*words, machine["date"]])


def notes(content: Row) -> list[str]:
    """What a table of students cannot say in its cells, a line each."""
    lines = [content["interrupted"]] if content.get("interrupted") else []
    if baseline := content.get("baseline"):
        lost = not any(row.get("ratio") for row in content["rows"])
        lines.append(
            f"no ratios: {baseline}, which they would be to, was lost"
            if lost
            else f"ratio: time over that of {baseline}, measured beside it; 95 % interval in brackets"
        )
    if any(len(row.get("pairs_ms", [])) == 1 for row in content["rows"]):
        lines.append("intervals are those of one launch: another may differ by more")
    lines += [f"{row['name']}:{row['backend']}: {row['reason']}" for row in content["rows"] if row.get("reason")]
    cut = [row for row in content["rows"] if row.get("images_per_s") and row.get("batch_reason")]
    lines += [f"{row['name']}:{row['backend']}: {row['batch_reason']}" for row in cut]
    unsettled = [f"{row['name']}:{row['backend']}" for row in content["rows"] if row.get("stable") is False]
    if unsettled:
        lines.append(f"had not settled when measuring began: {', '.join(unsettled)}")
    reasons: dict[str, list[str]] = {}
    for backend, reason in content.get("not_here", {}).items():
        reasons.setdefault(reason, []).append(backend)
    return lines + [f"not here: {', '.join(backends)}: {reason}" for reason, backends in reasons.items()]


def _is_shown(key: str, value: Any) -> bool:
    return key not in NOT_SHOWN and not isinstance(value, list | dict)


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    if key == "ratio":
        return _ratio(row)
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _number(value: float | None, per: float = 1.0, form: str = ".1f") -> str:
    return "" if value is None else f"{value / per:,{form}}"


def _or_reason(cell: Callable[[Row], str], key: str = "reason", otherwise: str = "") -> Callable[[Row], str]:
    """A cell, or the short form of why it is empty."""
    return lambda row: cell(row) or row.get(key) or ("failed" if row.get("reason") else otherwise)


def _latency(row: Row) -> str:
    if row.get("median_ms") is None:
        return ""
    return f"{_number(row['median_ms'])} ({_number(row['p10_ms'])}–{_number(row['p90_ms'])})"


def _ratio(row: Row) -> str:
    if row.get("ratio") is None:
        return ""
    low, high = row.get("ratio_low"), row.get("ratio_high")
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    return f"{row['ratio']:.3f}{interval}"


def _change(row: Row) -> list[str]:
    interval = f" [{row['change_low']:.3f}, {row['change_high']:.3f}]" if "change_low" in row else ""
    return [
        row["benchmark"],
        row["name"],
        row["backend"],
        _number(row.get("before_ms")),
        _number(row.get("after_ms")),
        f"{row['change']:.3f}{interval}" if "change" in row else "",
        row["verdict"],
        row.get("other", ""),
    ]


def _rate(row: Row) -> str:
    return "" if row.get("images_per_s") is None else f"{row['images_per_s']:.2f} ({row['best_batch']})"


def _memory(row: Row) -> str:
    gpu = _number(row.get("peak_gpu_bytes"), 1e6, ".0f")
    return _number(row.get("peak_memory_bytes"), 1e6, ".0f") + (f" + GPU {gpu}" if gpu else "")


def _miou(row: Row) -> str:
    values = [row.get("miou_point"), row.get("miou_box")]
    return "" if None in values else " / ".join(f"{value:.3f}" for value in values)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "contender": lambda row: row["name"],
    "backend": lambda row: row["backend"],
    "params M": lambda row: _number(row.get("parameters"), 1e6, ".2f") or "not counted",
    "GMACs": lambda row: _number(row.get("macs"), 1e9) or "not counted",
    "file MB": lambda row: _number(row.get("file_bytes"), 1e6),
    "encoder ms (p10–p90)": _or_reason(_latency),
    "ratio": _ratio,
    "decoder ms": _or_reason(lambda row: _number(row.get("decoder_median_ms")), "decoder_reason", "not asked"),
    "images/s (batch)": _or_reason(_rate, "batch_reason", "not asked"),
    "peak MB": _memory,
    "mIoU point / box": lambda row: _miou(row) or "not evaluated",
}
