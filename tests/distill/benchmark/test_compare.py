import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from distill.benchmark.main import main
from distill.benchmark.timing import Measured


def row(name: str, work: float, seed: int, noise: float = 0.02, **known: Any) -> dict[str, Any]:
    rng = random.Random(seed)
    drifts = [[rng.uniform(0.8, 1.6) for _ in range(3)] for _ in range(5)]
    pairs = [[(drift, work * drift * (1 + rng.gauss(0, noise))) for drift in launch] for launch in drifts]
    seconds = [[own for _, own in launch] for launch in pairs]
    return {"name": name, "backend": "eager", **Measured(seconds, pairs).as_json(), "reason": None, **known}


def write(path: Path, rows: list[dict[str, Any]], baseline: str = "base:eager", device: str = "a CPU") -> str:
    machine = {"device": device, "threads": 2, "torch": "2.9", "system": "Linux"}
    path.write_text(json.dumps({"students": {"rows": rows, "baseline": baseline, "machine": machine}, "cache": "old"}))
    return str(path)


def test_what_changed_beyond_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {"name": "base", "backend": "eager", "median_ms": 1e3, "pairs_ms": [[[1.0, 1.0]], [[1.0, 1.0]]]}
    before = write(
        tmp_path / "a.json",
        [
            base, row("a1", 2.0, 1), row("a2", 2.0, 2), row("a3", 2.0, 3),
            row("noisy", 2.0, 4, noise=0.2), row("a5", 1.0, 5), row("breaks", 1.0, 6),
            row("grown", 1.0, 7, parameters=5, peak_memory_bytes=100e6, miou_box=0.8, miou_point=0.7),
        ],
    )  # fmt: skip
    after = write(
        tmp_path / "b.json",
        [
            base, row("a1", 2.0, 11), row("a2", 2.2, 12), row("a3", 1.8, 13),
            row("noisy", 2.2, 14, noise=0.2), row("a6", 1.0, 15),
            {"name": "breaks", "backend": "eager", "reason": "killed"},
            row("grown", 1.0, 17, parameters=6, peak_memory_bytes=150e6, miou_box=0.81, miou_point=0.7),
        ],
        device="another CPU",
    )  # fmt: skip
    assert main(["compare", before, after]) == 0
    text = capsys.readouterr().out
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("students ")}
    for name, verdict in {
        "base": "no ratio", "a1": "same within noise", "a2": "slower", "a3": "faster", "a6": "new",
        "noisy": "same within noise", "a5": "gone", "breaks": "fails now: killed", "grown": "same within noise",
    }.items():  # fmt: skip
        assert re.search(rf" {verdict}( |$)", lines[name])
    assert "parameters 5 → 6; peak memory 100 → 150 MB; mIoU by box 0.800 → 0.810" in lines["grown"]
    assert "mIoU by point" not in text
    assert "2 of 9 rows changed" in text
    assert "students: device was a CPU, is another CPU" in text


def test_ratios_to_different_baselines_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / f"{place}.json", [row("x", 1.0 + place, 1)], f"{place}") for place in range(2)]
    assert main(["compare", *files]) == 0
    assert "another baseline" in capsys.readouterr().out


def test_one_launch_is_not_enough_for_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another process of the same program may be faster or slower as a whole."""
    rows = [row("x", work, seed) for work, seed in ((1.0, 1), (1.5, 2))]
    for each in rows:
        del each["pairs_ms"][1:]
    files = [write(tmp_path / f"{place}.json", [each]) for place, each in enumerate(rows)]
    assert main(["compare", *files]) == 0
    assert "cannot be told: one launch" in capsys.readouterr().out


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, text = tmp_path / "empty.json", tmp_path / "text.json"
    empty.write_text("{}")
    text.write_text("[]")
    for arguments, said in (
        ([], "compare takes two files"),
        ([str(tmp_path / "no.json"), str(empty)], "no.json: no such file"),
        ([str(empty), str(empty)], "have no benchmark in common"),
        ([str(text), str(empty)], "text.json is no benchmark.json"),
    ):
        assert main(["compare", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
