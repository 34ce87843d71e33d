"""What is measured on a GPU is tried on the CPU, with small models."""

import json
from pathlib import Path

import pytest
import torch

from distill.benchmark.main import main

EVALUATE = ("image_size=128", "longest_side=300", "masks=5", "rounds=2", "device=cpu")
SMALL = (
    "teacher=toy",
    "student=repvit_m0_9",
    "image_size=128",
    "teacher_batch=2",
    "batch_size=2",
    "images=4",
    "steps=1",
)


def test_evaluate(tmp_path: Path) -> None:
    out = tmp_path / "benchmark.json"
    assert main(["evaluate", *EVALUATE, "images=3", f"out={out}"]) == 0
    whole, *parts = json.loads(out.read_text())["evaluate"]["rows"]
    assert (whole["name"], whole["backend"]) == ("3 photographs of 300 x 200, 5 masks each", "whole")
    assert whole["images_per_s"] == pytest.approx(3e3 / whole["median_ms"], rel=0.01)
    assert [row["backend"] for row in parts] == ["make prompts", "embed", "masks and their IoUs"]
    assert all(row["median_ms"] > 0 for row in parts)


@pytest.mark.slow
def test_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "benchmark.json"
    assert main(["gpu", *SMALL, "steps=1", "masks=3", "rounds=1", "compile=false", "device=cpu", f"out={out}"]) == 0
    content = json.loads(out.read_text())["gpu"]
    parts = ["teacher", "pipeline", "train", "evaluate"]
    assert list(content["parts"]) == list(dict.fromkeys(row["name"].partition(":")[0] for row in content["rows"]))
    assert list(content["parts"]) == parts
    backends = {(row["name"].partition(":")[0], row["backend"]) for row in content["rows"]}
    assert {
        ("teacher", "ours, bfloat16"), ("teacher", "ours, bfloat16, from JPEG to shard"), ("pipeline", "threads"),
        ("train", "bfloat16, channels_last"), ("train", "bfloat16, from the cache"), ("evaluate", "whole"),
    } <= backends  # fmt: skip
    assert content["parts"]["train"]["settings"]["batch_size"] == 2
    assert "teacher: toy" in capsys.readouterr().out
    assert "## gpu" in out.with_suffix(".md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", f"out={tmp_path / 'b.json'}"]) == 2
    assert capsys.readouterr().err == "benchmark.py: device=cuda: this PyTorch finds no GPU\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "name=repvit_m9"], "name=repvit_m9 is not known; did you mean"),
        (["evaluate", "image_size=100"], "image_size is a multiple of 64"),
        (["gpu", "device=cpu", "images=1"], "images are at least teacher_batch"),
        (["gpu", "device=cpu", "student=repvit_m9"], "student=repvit_m9 is not known; did you mean"),
        (["gpu", "device=cpu", "teacher=vit_g"], "teacher=vit_g is not known; did you mean"),
        (["gpu", "device=cpu", "image_size=512"], "image_size=512: SAM's ViTs take 1024 px"),
    ],
)
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
