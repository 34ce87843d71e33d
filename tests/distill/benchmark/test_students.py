import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from distill.benchmark import students
from distill.benchmark.backends import BACKENDS, Runner
from distill.benchmark.contenders import facts, find_contenders
from distill.benchmark.main import main
from distill.benchmark.plot import pareto
from distill.benchmark.worker import Bench, Lost, Worker, serve
from embeddings_cache.system.files import sha256
from students import create_student, save_student
from workers import crash, sleep_on

SIZE = 64
FEW = (
    f"image_size={SIZE}",
    "launches=2",
    "rounds=2",
    "decoder_runs=2",
    "batches=1,2",
    "threads=1",
    "turn_seconds=0.05",
)


def onnx_encoder(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> Path:
    """A file with an encoder's input and output, and anything in between."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, SIZE, SIZE])
    embedding = helper.make_tensor_value_info("image_embeddings", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "encoder", [image], [embedding], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def not_a_number(path: Path) -> Path:
    node = helper.make_node("Mul", ["image", "nan"], ["image_embeddings"])
    return onnx_encoder(path, [node], {"nan": np.array(np.nan, dtype=np.float32)})


def far_too_large(path: Path) -> Path:
    """Asks for 4 PB at once."""
    shape = np.array([1024, 1024, 1024, 1024 * 1024], dtype=np.int64)
    fill = helper.make_node("Expand", ["image_sum", "shape"], ["image_embeddings"])
    add = helper.make_node("ReduceSum", ["image"], ["image_sum"], keepdims=1)
    return onnx_encoder(path, [add, fill], {"shape": shape})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a benchmark of good and bad contenders leaves."""
    folder = tmp_path_factory.mktemp("students")
    run = folder / "run"
    run.mkdir()
    save_student(run / "student.safetensors", create_student("repvit_m1", SIZE), {})
    means = {prompt: {"all": {"student_teacher": score}} for prompt, score in (("point", 0.7), ("box", 0.9))}
    made_from = {"student_sha256": sha256(run / "student.safetensors")}
    (run / "evaluation.json").write_text(json.dumps({"masks": {"miou": means, "made_from": made_from}}))
    (folder / "garbage.onnx").write_bytes(b"<html>404</html>")
    (folder / "a=b, c").mkdir()
    (folder / "a=b, c" / "decoder.onnx").write_bytes(b"<html>404</html>")
    good = onnx_encoder(
        folder / "a=b, c" / "good.onnx", [helper.make_node("Relu", ["image"], ["image_embeddings"])], {}
    )
    contenders = [
        str(not_a_number(folder / "nan.onnx")), "repvit_m0_9", "repvit_m0_9", str(run / "student.safetensors"),
        str(folder / "garbage.onnx"), str(far_too_large(folder / "large.onnx")), str(good),
    ]  # fmt: skip
    backends = "backends=eager,onnxruntime,coreml-all,onnxruntime-cuda"
    assert main(["students", *contenders, *FEW, backends, f"out={folder / 'benchmark.json'}"]) == 0
    return folder


def rows_of(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads((folder / "benchmark.json").read_text())["students"]["rows"]
    return {(Path(row["name"]).name, row["backend"]): row for row in rows}


def test_every_number_of_those_that_run(folder: Path) -> None:
    rows = rows_of(folder)
    for name in ("repvit_m0_9", "repvit_m0_9 #2", "student.safetensors"):
        for backend in ("eager", "onnxruntime"):
            row = rows[name, backend]
            assert row["reason"] is None
            assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
            assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
            assert 0 < row["decoder_p10_ms"] <= row["decoder_median_ms"]
            assert [len(launch) for launch in row["decoder_samples_ms"]] == [2, 2]
            assert list(row["batches_ms"]) == ["1", "2"]
            assert row["images_per_s"] == pytest.approx(
                max(int(n) * 1e3 / np.median(samples) for n, samples in row["batches_ms"].items()), rel=0.01
            )
            assert 100e6 < row["peak_memory_bytes"] < 4e9
            if (name, backend) != ("repvit_m0_9", "eager"):
                assert [len(launch) for launch in row["pairs_ms"]] == [2, 2]
            assert min(map(len, row["samples_ms"])) >= 2
            assert len(row["warm_up_ms"]) == 2
    assert rows["repvit_m0_9", "eager"]["ratio"] == 1


def test_a_decoder_that_fails_is_not_the_encoders_fault(folder: Path) -> None:
    row = rows_of(folder)["good.onnx", "onnxruntime"]
    assert row["median_ms"] > 0
    assert "decoder_median_ms" not in row
    assert "decoder.onnx" in row["decoder_reason"]
    assert row["batch_reason"] == "takes one image at once"
    assert row["images_per_s"] > 0


def test_a_bad_contender_costs_its_own_row_alone(folder: Path) -> None:
    rows = rows_of(folder)
    for name, why in {
        "garbage.onnx": "cannot be read as ONNX",
        "nan.onnx": "its encoder makes numbers that are not finite",
        "large.onnx": "alloc",
    }.items():
        assert why in rows[name, "onnxruntime"]["reason"]
        assert "median_ms" not in rows[name, "onnxruntime"]
    for backend in ("coreml-all", "onnxruntime-cuda"):
        if missing := BACKENDS[backend].missing():
            assert rows["repvit_m0_9", backend]["reason"] == missing
    assert not {("nan.onnx", "eager"), ("nan.onnx", "coreml-all")} & rows.keys()


def test_fidelity_comes_from_the_evaluation_of_these_very_weights(folder: Path) -> None:
    rows = rows_of(folder)
    row = rows["student.safetensors", "eager"]
    assert (row["miou_point"], row["miou_box"]) == (0.7, 0.9)
    assert rows["repvit_m0_9", "eager"]["miou_box"] is None
    student = folder / "run" / "student.safetensors"
    copy = folder / "other" / "student.safetensors"
    copy.parent.mkdir()
    save_student(copy, create_student("repvit_m1", SIZE), {})
    (copy.parent / "evaluation.json").write_bytes((student.parent / "evaluation.json").read_bytes())
    (contender,) = find_contenders([str(copy)], 1024)
    assert facts(contender)["miou_box"] is None


def test_a_runs_exported_encoders_are_measured_and_described_with_it(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the place of what the export measured in short; an earlier version's folder is left alone."""
    run = tmp_path / "run"
    shutil.copytree(finished_run / "run" / "export", run / "export")
    few = ["backends=onnxruntime", "rounds=1", "turn_seconds=0.05", "threads=1", f"out={tmp_path / 'b.json'}"]
    assert main(["students", str(run), "--quick", *few]) == 0
    (row,) = json.loads((tmp_path / "b.json").read_text())["students"]["rows"]
    assert row["name"] == str(run / "export" / "encoder.onnx")
    (latency,) = json.loads((run / "export" / "manifest.json").read_text())["files"]["encoder.onnx"]["latency"]
    assert latency["by"] == "benchmark.py students"
    assert (latency["ms"], latency["threads"]) == (row["median_ms"], 1)
    assert latency["runs"] == sum(map(len, row["samples_ms"]))
    readme = (run / "export" / "README.md").read_text()
    assert re.search(
        rf"^\| `encoder.onnx` \| {row['median_ms']} \(.*\) \| onnxruntime, 1 thread \|", readme, re.MULTILINE
    )
    assert "stage=export` takes" not in readme

    manifest = json.loads((run / "export" / "manifest.json").read_text())
    del manifest["card"]
    (run / "export" / "manifest.json").write_text(json.dumps(manifest))
    assert main(["students", str(run), f"{run}/export/encoder.onnx", "--quick", *few]) == 2
    assert "is an earlier version's: stage=export run_dir=" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "b.json").read_text())["students"]["rows"]) == 2


def test_what_is_written_for_people(folder: Path) -> None:
    page = (folder / "benchmark.md").read_text()
    content = json.loads((folder / "benchmark.json").read_text())["students"]
    assert content["machine"]["threads"] == 1
    assert content["settings"]["launches"] == 2
    assert content["baseline"] == "repvit_m0_9:eager"
    header, *lines = [line for line in page.splitlines() if line.startswith("|")]
    assert header.count("|") == 12
    assert {line.count("|") for line in lines[: len(content["rows"]) + 1]} == {12}
    assert "its encoder makes numbers that are not finite" in page
    for published in ("48.9", "44.8", "482.2", "6,249.5", "out of memory", "11.6", "11.8"):
        assert f"| {published} |" in page
    assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    svg = (folder / "benchmark.svg").read_text()
    assert "<svg" in svg


def test_a_run_compared_with_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(folder / "benchmark.json")
    assert main(["compare", file, file]) == 0
    text = capsys.readouterr().out
    assert text.count("same within noise") == 6
    assert text.count("no ratio") == 1
    assert "0 of " in text


@pytest.mark.parametrize(
    "name",
    [
        "repvit_m0_9",
        pytest.param("tiny_vit_5m", marks=pytest.mark.slow),
        pytest.param("repvit_m0_9-pyramid-512", marks=pytest.mark.slow),
    ],
)
def test_a_file_is_counted_as_the_model_that_it_was_made_of(name: str, tmp_path: Path) -> None:
    (contender,) = find_contenders([name], 128)
    prepare = BACKENDS["onnxruntime"].prepare
    assert prepare is not None
    prepare(contender, tmp_path)
    (file,) = find_contenders([str(tmp_path / "encoder.onnx")], 1024)
    expected, found = facts(contender), facts(file)
    assert found["macs"] == pytest.approx(expected["macs"], rel=0.01)
    assert found["parameters"] == pytest.approx(expected["parameters"], rel=0.02)


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    (contender,) = find_contenders(["repvit_m0_9"], SIZE)
    worker = Worker(serve, (contender, "eager", tmp_path, 1, 0.1), patience=60)
    assert worker.answer() == "ready"
    assert worker.ask("turn")[0] > 0
    assert worker.process.pid is not None
    os.kill(worker.process.pid, signal.SIGKILL)
    with pytest.raises(Lost, match="killed, most likely for want of memory"):
        worker.ask("turn")
    worker.close()


def test_a_process_that_says_nothing_or_crashes() -> None:
    with pytest.raises(Lost, match="no answer for 1 s"):
        Worker(sleep_on, (), patience=1).answer()
    with pytest.raises(Lost, match="died of SIGABRT"):
        Worker(crash, (), patience=60).answer()


def test_inputs_differ_from_run_to_run() -> None:
    seen = []

    def encode(pixels: np.ndarray) -> np.ndarray:
        seen.append(pixels)
        time.sleep(0.002)
        return pixels

    bench = Bench(Runner(8, lambda pixels: pixels, encode, "none", batches=True), 0.01)
    bench.warm_up()
    bench.throughput(2)
    shapes = {pixels.shape for pixels in seen}
    assert shapes == {(1, 3, 8, 8), (2, 3, 8, 8)}
    single = [pixels for pixels in seen if len(pixels) == 1]
    assert len({pixels.tobytes() for pixels in single}) == len(single) >= 6
    assert {pixels.dtype for pixels in seen} == {np.dtype(np.uint8)}


def test_the_pareto_front() -> None:
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 7.0), (3.0, 6.0), (4.0, 1.0), (1.0, 9.0)]
    assert pareto(points) == [0, 1, 4]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["repvit_m9"], "contender 'repvit_m9' is neither known nor a file; did you mean 'repvit_m"),
        (["nowhere.onnx"], "nowhere.onnx: no such file"),
        (["tests"], "tests has no exported encoder: python distill.py stage=export run_dir=tests"),
        (["repvit_m0_9", "backends=eagre"], "backends=eagre is not known; did you mean 'eager'?"),
        (["repvit_m0_9", "baseline=vit_b"], "baseline=vit_b is none of the rows"),
        (["repvit_m0_9", "batches=1,x"], "batches=1,x are not numbers of images"),
        (["repvit_m0_9", "image_size=100"], "image_size=100 is not a multiple of 64"),
        (["vit_b", "image_size=512"], "vit_b takes images of 1024 px only"),
        (["repvit_m0_9", "launches=0"], "launches=0 is less than 1"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["students", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_quick_keeps_what_was_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    assert (
        main(
            ["students", "repvit_m0_9", "--quick", f"image_size={SIZE}", "rounds=1", "turn_seconds=0.05", f"out={out}"]
        )
        == 0
    )
    content = json.loads(out.read_text())["students"]
    (row,) = content["rows"]
    assert row["backend"] == "eager"
    assert len(row["pairs_ms"]) == len(row["pairs_ms"][0]) == 1
    assert "decoder_median_ms" not in row
    assert "images_per_s" not in row


def test_after_ctrl_c_there_is_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b.json"
    real, began = students.launch, []

    def interrupted(*arguments: Any) -> Any:
        began.append(arguments)
        if len(began) == stop:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(students, "launch", interrupted)
    arguments = ["students", "repvit_m0_9", "backends=eager", *FEW, "launches=4", f"out={out}"]
    stop = 1
    assert main(arguments) == 130
    assert not out.exists()
    began, stop = [], 3
    assert main(arguments) == 130
    content = json.loads(out.read_text())["students"]
    assert content["interrupted"] == "interrupted after 2 of 4 launches"
    assert "interrupted after 2 of 4 launches" in capsys.readouterr().out
    (row,) = content["rows"]
    assert len(row["pairs_ms"]) == 2
    assert row["batch_reason"] == "interrupted"


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    student = tmp_path / "student.safetensors"
    save_student(student, create_student("repvit_m0_9", SIZE, widths=[8, 16, 24, 32], depths=[1, 1, 1, 1]), {})
    arguments = [str(student), "backends=eager,compiled", f"image_size={SIZE}", "launches=1", "rounds=1", f"out={out}"]
    assert main(["students", *arguments, "decoder_runs=0"]) == 0
    eager, compiled = json.loads(out.read_text())["students"]["rows"]
    assert compiled["reason"] is None
    assert compiled["ratio"] > 0
    assert eager["macs"] == compiled["macs"]
    assert torch.__version__ == json.loads(out.read_text())["students"]["machine"]["torch"]
