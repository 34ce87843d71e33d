import json
from functools import partialmethod
from pathlib import Path

import pytest
from torch import nn

from distill.benchmark.main import main

SMALL = ("image_size=128", "rows=4", "rounds=2", "steps=2", "device=cpu")
FEW = "overrides={widths: [8, 16, 24, 32], depths: [1, 1, 1, 1]}"


def test_train(tmp_path: Path) -> None:
    out = tmp_path / "benchmark.json"
    assert main(["train", *SMALL, "memory=false", "precisions=float32,bfloat16", f"out={out}"]) == 0
    rows = json.loads(out.read_text())["train"]["rows"]
    assert [row["backend"] for row in rows] == [
        "float32", "float32, channels_last", "bfloat16", "bfloat16, channels_last", "float32, from the cache",
    ]  # fmt: skip
    for row in rows:
        assert row["images_per_s"] == pytest.approx(2e3 / row["median_ms"], rel=0.01)
        hours = 8 * 112_000 / row["images_per_s"] / 3600  # of a rate that is rounded to thousandths
        assert row["hours_of_8_epochs"] == pytest.approx(hours, rel=0.001, abs=0.1)
        assert row["speed_up"] == pytest.approx(1 / row["ratio"], rel=0.01)
    assert rows[0]["ratio"] == 1
    assert rows[-1]["of_memory_step"] == rows[-1]["ratio"]


@pytest.mark.slow
def test_memory(tmp_path: Path) -> None:
    out = tmp_path / "benchmark.json"
    assert main(["train", *SMALL, FEW, "precisions=float32", f"out={out}"]) == 0
    rows = json.loads(out.read_text())["train"]["rows"]
    assert all(row["peak_memory_bytes"] > 50_000_000 for row in rows[:-1])


@pytest.mark.slow
def test_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a student of four blocks, forwards and backwards; all but the C++ that comes of it, which takes minutes."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    out = tmp_path / "benchmark.json"
    assert main(["train", *SMALL, FEW, "compile=true", "memory=false", "precisions=float32", f"out={out}"]) == 0
    rows = json.loads(out.read_text())["train"]["rows"]
    assert {"float32, compiled", "float32, channels_last, compiled"} <= {row["backend"] for row in rows}
    assert all(row["images_per_s"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("overrides={heights: [1]}", "student 'repvit_m0_9' has no 'heights' to override; it has"),
        ("name=repvit_m9", "name=repvit_m9 is not known; did you mean"),
        ("precisions=float32,int8", "precisions=int8 is not known"),
        ("image_size=100", "image_size is a multiple of 64"),
        ("batch_size=64", "rows are at least batch_size"),
        ("device=tpu", "device=tpu is not known"),
    ],
)
def test_mistakes(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", argument]) == 2
    assert said in capsys.readouterr().err
