"""What an export says of a student beside its files."""

import json
import re
import shutil
from pathlib import Path

import onnx
import pytest
from accelerate import Accelerator

from distill.export import card, subject
from distill.export.folder import export
from distill.recipe import load_recipe
from embeddings_cache.system.files import write_json
from exports import export_recipe, small_student
from students import save_student


def test_the_files_and_what_is_said_of_them_name_the_licence(
    finished_run: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    """Without a word of it, that it was not said: the shared run's scenes came out of a tar, as photographs do."""

    def said(directory: Path) -> list[str]:
        model = onnx.load(directory / "encoder.onnx")
        (licence,) = (entry.value for entry in model.metadata_props if entry.key == "license")
        (line,) = re.findall(r"^- Licence: (.+)$", (directory / "README.md").read_text(), re.MULTILINE)
        return [licence, line, json.loads((directory / "manifest.json").read_text())["card"]["license"]]

    assert said(finished_run / "run" / "export") == [subject.NOT_SAID] * 3
    checkpoint = finished_run / "run" / "student.safetensors"
    export(export_recipe(tmp_path, checkpoint, "export.license=CC-BY-NC-4.0", "export.images=1"), accelerator)
    assert said(tmp_path / "run" / "export") == ["CC-BY-NC-4.0"] * 3


def test_a_new_evaluation_is_told_and_no_file_made_again(
    finished_run: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("student.safetensors", "evaluation.json"):
        shutil.copy(finished_run / "run" / name, run)
    recipe = export_recipe(tmp_path, run / "student.safetensors", "export.images=1")
    assert export(recipe, accelerator)
    manifest, readme = (run / "export" / name for name in ("manifest.json", "README.md"))
    evaluation = json.loads((run / "evaluation.json").read_text())
    means = evaluation["masks"]["miou"]["box"]["all"]
    told = json.loads(manifest.read_text())["card"]["evaluation"]
    assert told["miou"]["box"] == {name: means[name] for name in ("student_teacher", "student_truth", "teacher_truth")}
    assert told["images"] == evaluation["masks"]["images"]
    assert f"| box | {means['student_teacher']:.3f} | {means['student_truth']:.3f} |" in readme.read_text()
    before = (run / "export" / "encoder.onnx").stat().st_mtime_ns
    latency = json.loads(manifest.read_text())["files"]["encoder.onnx"]["latency"]
    assert latency[0]["ms"] > 0
    assert not export(recipe, accelerator)

    evaluation["masks"]["made_from"]["evaluate"]["masks_per_image"] = 7
    means["student_teacher"] = 0.123
    write_json(run / "evaluation.json", evaluation)
    assert export(recipe, accelerator)
    assert "| box | 0.123 | " in readme.read_text()
    assert (run / "export" / "encoder.onnx").stat().st_mtime_ns == before
    assert json.loads(manifest.read_text())["files"]["encoder.onnx"]["latency"] == latency

    evaluation["masks"]["made_from"]["student_sha256"] = "another student's"
    write_json(run / "evaluation.json", evaluation)
    assert export(recipe, accelerator)
    assert "It has not been evaluated" in readme.read_text()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("teacher: {name: toy}\ndata: {images: 'scenes:8'}", "Apache-2.0"),
        ("teacher: {name: toy}\ndata: {images: photos}", subject.NOT_SAID),
        ("teacher: {name: vit_h}\ndata: {images: 'scenes:8'}", subject.NOT_SAID),
        ("teacher: {name: toy}\ndata: {images: 'scenes:8'}\nstudent: {start: mobile_sam.pt}", subject.NOT_SAID),
        ("teacher: {name: toy}\ndata: {images: 'scenes:8'}\nstudent: {pretrained: auto}", subject.NOT_SAID),
        ("name: x", subject.NOT_SAID),
    ],
)
def test_a_licence_is_known_only_of_what_is_all_our_own(recipe: str, expected: str, tmp_path: Path) -> None:
    """By the recipe that trained the student, not by that of the command."""
    save_student(tmp_path / "s.safetensors", small_student(), {"recipe": recipe})
    asked = load_recipe(["recipe=quickstart", f"checkpoint={tmp_path / 's.safetensors'}"])
    assert subject.license_of(asked) == expected
    described = card.card_of(asked, subject.Subject("x", "toy", "x", *[small_student()] * 2, None, None))
    assert ("photographs" in described["limits"][0]) == (expected == "Apache-2.0" or "vit_h" in recipe)
