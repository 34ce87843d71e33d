import json
from pathlib import Path

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling.image_encoder import Block

from distill.benchmark.cache import CacheBenchmark, make_cache, map_plainly, whole_row
from distill.benchmark.main import main
from distill.benchmark.teacher import TeacherBenchmark, load_sam
from distill.benchmark.timing import ratio
from embeddings_cache.shards.reader import EmbeddingsCache
from students import create_student, save_student


def test_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "benchmark.json"
    out.write_text('{"cache": "measured before"}')
    arguments = ["name=toy", "image_size=128", "rounds=2", "memory=false", "device=cpu", f"out={out}"]
    assert main(["teacher", *arguments]) == 0
    assert json.loads(out.read_text())["cache"] == "measured before"
    content = json.loads(out.read_text())["teacher"]
    baseline, exact, half, pipeline = content["rows"]
    fastest = min(exact, half, key=lambda row: row["median_ms"])
    assert [row["backend"] for row in content["rows"]] == [
        "segment-anything, float32", "ours, float32", "ours, bfloat16", f"{fastest['backend']}, from JPEG to shard",
    ]  # fmt: skip
    assert pipeline["images_per_s"] == pytest.approx(2e3 / pipeline["median_ms"], rel=0.01)
    assert 0 < pipeline["of_encoder_alone"] < 1.5
    assert baseline["relative_error"] == 0
    assert exact["max_difference"] < 1e-4
    assert 1e-4 < half["relative_error"] < 2e-2
    assert all(row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] for row in content["rows"])
    assert exact["speed_up"] == pytest.approx(1 / exact["ratio"], rel=0.01)
    assert ratio(exact["pairs_ms"])["ratio"] == pytest.approx(exact["ratio"], rel=1e-3)
    assert exact["ratio_low"] < exact["ratio"] < exact["ratio_high"]
    assert baseline["ratio"] == 1
    assert pipeline["ratio"] is None
    assert "| ours, bfloat16 |" in out.with_suffix(".md").read_text()
    assert content["machine"]["torch"] == torch.__version__
    assert "ours, bfloat16" in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkpoint_is_compared_with_segment_anythings_blocks(tmp_path: Path) -> None:
    torch.save(sam_model_registry["vit_b"]().state_dict(), tmp_path / "sam.pth")
    assert type(load_sam(TeacherBenchmark(checkpoint=str(tmp_path / "sam.pth"))).image_encoder.blocks[0]) is Block


def test_a_student_as_a_teacher(tmp_path: Path) -> None:
    student = tmp_path / "student.safetensors"
    save_student(student, create_student("tiny_vit_5m", 128), {})
    arguments = [f"checkpoint={student}", "rounds=1", "memory=false", "device=cpu", f"out={tmp_path / 'b.json'}"]
    assert main(["teacher", *arguments]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["teacher"]["rows"]
    assert {row["name"] for row in rows} == {"student"}
    assert rows[1]["max_difference"] < 1e-4


def test_cache(tmp_path: Path) -> None:
    out = tmp_path / "benchmark.json"
    arguments = ["rows=6", "image_size=128", "open_rows=600", "rounds=2", f"dir={tmp_path}", f"out={out}"]
    assert main(["cache", *arguments]) == 0
    rows = json.loads(out.read_text())["cache"]["rows"]
    assert [(row["name"], row["backend"]) for row in rows] == [
        ("6 embeddings in random order", "np.memmap"), ("6 embeddings in random order", "cache"),
        ("6 whole rows in random order", "np.memmap"), ("6 whole rows in random order", "cache"),
        ("open 600 rows in 3 shards", "cache"),
    ]  # fmt: skip
    assert rows[0]["of_memmap"] == rows[2]["of_memmap"] == 1
    assert all(row["median_ms"] > 0 for row in rows)
    assert rows[4]["added_bytes"] < 200e6
    read = [row["GiB_per_s"] * row["median_ms"] for row in rows[:4]]  # bytes
    assert read[0] == pytest.approx(read[1], rel=0.05)
    assert read[2] == pytest.approx(read[3], rel=0.05)
    assert read[2] > 1.1 * read[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.json", "benchmark.md"]


def test_pipeline(tmp_path: Path) -> None:
    out = tmp_path / "benchmark.json"
    arguments = ["images=5", "workers=0,2", "image_size=128", "rounds=2", f"dir={tmp_path}", f"out={out}"]
    assert main(["pipeline", *arguments]) == 0
    threads, workers, *steps = json.loads(out.read_text())["pipeline"]["rows"]
    assert (threads["backend"], workers["backend"]) == ("threads", "2 workers")
    for row in (threads, workers):
        assert row["name"] == "5 photographs from JPEG to shard"
        assert row["images_per_s"] == pytest.approx(5e3 / row["median_ms"], rel=0.01)
    decoding = next(row for row in steps if row["backend"] == "decode")
    assert threads["own_cpu_ms_per_image"] == threads["cpu_ms_per_image"] > 0.5 * decoding["median_ms"]
    # What decoding takes, workers take.
    assert workers["own_cpu_ms_per_image"] + 0.5 * decoding["median_ms"] < workers["cpu_ms_per_image"]
    named = ["decode", "resize", "encode as kept", "decode again", "hand to a worker", "take from a worker"]
    assert [row["backend"] for row in steps] == [*named, "stack", "write"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.json", "benchmark.md"]


def test_reading_is_compared_on_the_same_bytes(tmp_path: Path) -> None:
    settings = CacheBenchmark(rows=9, image_size=64)
    make_cache(tmp_path, settings)
    cache = EmbeddingsCache(tmp_path)
    mapped, ends = map_plainly(tmp_path / "plain.bin", cache, whole_row)
    for index, end in enumerate(ends):
        row = cache[index]
        expected = row.embedding.tobytes() + row.encoded + row.annotation.encode()
        assert bytes(mapped[end - len(expected) : end]) == expected
    assert ends[-1] == len(mapped)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["teachers"], "'teachers' is no benchmark; did you mean 'teacher'?"),
        (["teacher", "round=3"], "'round=3' is no key=value of teacher; did you mean 'rounds'?"),
        (["teacher", "rounds=many"], "many"),
        (["teacher", "name=vit_x"], "name=vit_x is not known; did you mean 'vit_"),
        (["teacher", "dtypes=float32,fp16"], "dtypes=fp16 is not known; did you mean 'float16'?"),
        (["teacher", "device=gpu"], "device=gpu is not known"),
        (["pipeline", "workers=0,-1"], "workers=0,-1 is neither auto nor different numbers after commas"),
        (["pipeline", "workers=2,2"], "workers=2,2 is neither auto nor different numbers"),
        (["cache", "dtype=int4"], "dtype=int4 is not known"),
        (["teacher", "rounds=0"], "rounds=0 is less than 1"),
        (["teacher", "pipeline=-1"], "pipeline=-1 is less than 0"),
        (["teacher", "name=mobile_sam"], "name=mobile_sam is not known"),
        (["teacher", "checkpoint=nowhere.pt"], "nowhere.pt: no such file"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmark.py: ")
    assert named in line


def test_another_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, why in (("[1]", "is no benchmark.json"), ("a,b", "is not valid JSON")):
        out = tmp_path / "mine"
        out.write_text(content)
        assert main(["teacher", "name=toy", f"out={out}"]) == 2
        assert why in capsys.readouterr().err
        assert out.read_text() == content


def test_help_says_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "  name=vit_b " in text
    assert "  checkpoint=null " in text
    assert "  open_rows=112000 " in text
