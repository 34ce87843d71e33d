import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from accelerate import Accelerator

from distill.export import folder, makers, proof, subject
from distill.export.coreml.program import MilProgram
from distill.export.encoder import pad_with_mean_colour
from distill.export.files import digest
from distill.export.folder import export
from distill.export.onnx import encoder as onnx_encoder
from distill.export.onnx import int8
from distill.export.onnx.file import open_session
from distill.export.proof import Bounds, ParityError
from distill.main import main
from distill.recipe import load_recipe
from embeddings_cache.images.preprocessing import resize_longest_side
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.system.files import sha256
from embeddings_cache.teacher.loading import load_teacher
from exports import export_recipe, small_student
from students import create_student, load_student, read_metadata, save_published, save_student
from students.sam import untrained_sam
from support import ROOT, TINY, Cli, places


def picture() -> np.ndarray:
    return resize_longest_side(generate_scene(np.random.default_rng(0), 300)[0][:120, :90], 128)


def embed(path: Path) -> np.ndarray:
    return open_session(path).run(None, {"image": pad_with_mean_colour(picture(), 128)})[0]


def test_manifest_describes_the_files(finished_run: Path) -> None:
    directory = finished_run / "run" / "export"
    manifest = json.loads((directory / "manifest.json").read_text())
    student = load_student(finished_run / "run" / "student.safetensors")
    assert manifest["student"] == {
        "name": "repvit_m0_9",
        "image_size": 128,
        "input_size": 128,
        "embed_dim": 128,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
    }
    assert (manifest["teacher"], manifest["recipe"]) == ("toy", "quickstart")
    assert manifest["versions"]["onnxruntime"] == onnxruntime.__version__
    assert set(manifest["files"]) == {"encoder.onnx"}
    entry = manifest["files"]["encoder.onnx"]
    assert entry["sha256"] == sha256(directory / "encoder.onnx")
    assert entry["bytes"] == (directory / "encoder.onnx").stat().st_size
    assert entry["inputs"]["image"]["padding_colour"] == [123.675, 116.28, 103.53]
    assert entry["inputs"]["image"]["range"] == [0, 255]
    assert entry["parity"]["max_difference"] <= entry["parity"]["allowed"]["max_difference"]
    assert entry["parity"]["mask_miou"] >= entry["parity"]["allowed"]["mask_miou"]


def test_any_student_can_be_exported_without_its_cache(
    finished_run: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    checkpoint = finished_run / "run" / "student.safetensors"
    recipe = export_recipe(tmp_path, checkpoint)
    export(recipe, accelerator)
    path = tmp_path / "run" / "export" / "encoder.onnx"
    preprocessed = load_teacher("toy", None, 128).preprocess(torch.from_numpy(picture()).permute(2, 0, 1))[None]
    expected = load_student(checkpoint)(preprocessed).detach().numpy()
    np.testing.assert_allclose(embed(path), expected, atol=1e-4)

    path.unlink()
    export(recipe, accelerator)  # a file that was removed is made again
    assert path.exists()
    before = path.stat().st_mtime_ns
    export(replace(recipe, train=replace(recipe.train, epochs=99)), accelerator)  # does not concern the export
    assert path.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_student_of_another_size_takes_a_decoder_of_its_own_size(
    finished_run: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    save_student(tmp_path / "s.safetensors", small_student(image_size=192), {})
    recipe = load_recipe([*TINY, *places(finished_run, "gone.tar"), "stage=export"])
    recipe = replace(recipe, run_dir=str(tmp_path / "run"), checkpoint=str(tmp_path / "s.safetensors"))
    export(recipe, accelerator)
    manifest = json.loads((tmp_path / "run" / "export" / "manifest.json").read_text())
    assert manifest["files"]["encoder.onnx"]["inputs"]["image"]["shape"] == [1, 3, 192, 192]


def test_a_checkpoint_alone_is_enough(finished_run: Path, tmp_path: Path, cli: Cli) -> None:
    """Its recipe is in its metadata; results go where the command runs."""
    metadata = read_metadata(finished_run / "run" / "student.safetensors")
    save_student(tmp_path / "mine.safetensors", small_student(), {**metadata, "steps": "80"})
    formats = "export.formats=onnx,onnx_fp16"
    result = cli("stage=export", "checkpoint=mine.safetensors", formats, "export.images=1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    directory = tmp_path / "runs" / "mine" / "export"
    manifest = json.loads((directory / "manifest.json").read_text())
    assert list(manifest["files"]) == ["encoder.onnx", "encoder_fp16.onnx"]
    assert manifest["files"]["encoder.onnx"]["parity"]["images"] == 1
    parity = manifest["files"]["encoder.onnx"]["parity"]
    assert parity["mask_miou"] == 1.0
    assert parity["empty_masks"] < parity["masks"] / 2
    assert (parity["images_from"], manifest["recipe"]) == (
        "held-out images of cache",
        "quickstart",
    )
    assert (directory / "README.md").read_text().startswith("# repvit_m0_9")


@pytest.mark.slow
def test_every_format_of_a_publishers_checkpoint(tmp_path: Path, cli: Cli) -> None:
    """In the layout of edge_sam.pth, which brings its own decoder, at 1024 px."""
    torch.manual_seed(0)
    student = create_student("repvit_m1_0", downsample="fuse").eval()
    sam = untrained_sam(student).eval()
    save_published(tmp_path / "edge_sam.pth", student, sam)
    result = cli(
        "stage=export",
        "checkpoint=edge_sam.pth",
        "export.formats=[onnx, onnx_decoder, coreml, cvat, anylabeling, label_studio]",
        "export.images=1",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    directory = tmp_path / "runs" / "edge_sam" / "export"
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["student"]["name"] == manifest["teacher"] == "repvit_m1_0-fuse"
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == digest(directory / name)
    for name in ("RepViTM10FuseEncoder.mlpackage", "cvat"):
        unused = " ! -path '*/__pycache__/*'" if name == "cvat" else ""
        sums = f"cd {name} && find . -type f{unused} | LC_ALL=C sort | xargs sha256sum | sha256sum"
        assert f"({sums})" in (directory / "README.md").read_text()
        printed = subprocess.run(sums, shell=True, cwd=directory, capture_output=True, text=True, check=True).stdout
        assert printed.split()[0] == manifest["files"][name]["sha256"]
    marks = {
        next(entry.value for entry in onnx.load(path).metadata_props if entry.key == "fingerprint")
        for path in directory.rglob("*.onnx")
    }
    assert len(marks) == 1
    assert len(list(directory.rglob("*.onnx"))) == 10
    assert 'forResource: "RepViTM10FuseDecoder"' in (directory / "swift" / "README.md").read_text()
    points = MilProgram(directory / "RepViTM10FuseDecoder.mlpackage").inputs["point_coords"]
    assert points.shapes == [[range(1, 2), range(18, 19), range(2, 3)]]


def test_what_cvat_cannot_take_is_refused_at_once(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student of 128 px: its programs have SAM's numbers written into them."""
    monkeypatch.chdir(tmp_path)
    checkpoint = f"checkpoint={finished_run / 'run' / 'student.safetensors'}"
    said = refused(capsys, checkpoint, "export.formats=[onnx, cvat]")
    assert "cvat takes students of 1024 px and 256 channels, which its programs have written into them" in said
    assert not list(tmp_path.rglob("*.onnx"))


@pytest.mark.slow
def test_a_file_that_fails_is_named_and_the_others_are_there(
    finished_run: Path, tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "INT8", Bounds(relative_error=1e-9))
    checkpoint = finished_run / "run" / "student.safetensors"
    recipe = export_recipe(tmp_path, checkpoint, "export.formats=[onnx, onnx_int8]", "export.images=1")
    with pytest.raises(ParityError, match=r"encoder_int8\.onnx differs from PyTorch: relative error 0\.0\d+, allowed"):
        export(recipe, accelerator)
    directory = tmp_path / "run" / "export"
    assert sorted(path.name for path in directory.iterdir()) == ["README.md", "encoder.onnx", "manifest.json"]
    manifest = json.loads((directory / "manifest.json").read_text())
    assert "encoder_int8.onnx" in manifest["failures"][0]
    monkeypatch.undo()
    monkeypatch.setattr(int8, "INT8", Bounds())
    export(recipe, accelerator)  # not current: tries again
    assert (directory / "encoder_int8.onnx").exists()
    assert "failures" not in json.loads((directory / "manifest.json").read_text())


@pytest.mark.slow
def test_other_formats_are_added_to_what_is_there_and_leftovers_go(
    finished_run: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    checkpoint, directory = finished_run / "run" / "student.safetensors", tmp_path / "run" / "export"
    export(export_recipe(tmp_path, checkpoint), accelerator)
    before = (directory / "encoder.onnx").stat().st_mtime_ns
    (directory / ".tmp-4711-encoder.onnx").touch()  # as kill -9 leaves them
    (directory / ".tmp-Encoder.mlpackage").mkdir()
    export(export_recipe(tmp_path, checkpoint, "export.formats=[onnx_fp16]"), accelerator)
    assert sorted(path.name for path in directory.iterdir()) == [
        "README.md", "encoder.onnx", "encoder_fp16.onnx", "manifest.json",
    ]  # fmt: skip
    assert (directory / "encoder.onnx").stat().st_mtime_ns == before
    assert set(json.loads((directory / "manifest.json").read_text())["files"]) == {"encoder.onnx", "encoder_fp16.onnx"}


@pytest.mark.slow
def test_a_folder_is_whole_or_made_again(finished_run: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    checkpoint, directory = finished_run / "run" / "student.safetensors", tmp_path / "run" / "export"
    directory.mkdir(parents=True)
    (directory / "decoder_cvat.onnx").write_bytes(b"an earlier version's")
    recipe = export_recipe(tmp_path, checkpoint, "export.formats=[label_studio]", "export.images=1")
    assert export(recipe, accelerator)
    assert not (directory / "decoder_cvat.onnx").exists()
    assert not export(recipe, accelerator)
    entry = json.loads((directory / "manifest.json").read_text())["files"]["label_studio"]
    assert entry["contents"] == sorted(path.name for path in (directory / "label_studio").iterdir())
    (directory / "label_studio" / "__pycache__").mkdir()  # as its use leaves it
    (directory / "label_studio" / "__pycache__" / "server.pyc").touch()
    assert digest(directory / "label_studio") == entry["sha256"]
    for name in ("decoder.onnx", "server.py"):
        (directory / "label_studio" / name).unlink()
        assert export(recipe, accelerator)
        assert (directory / "label_studio" / name).exists()
    assert "1.14" in (directory / "README.md").read_text()


def test_a_run_whose_student_was_not_trained_goes_on_to_its_report(
    finished_run: Path, tmp_path: Path, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    save_student(tmp_path / "s.safetensors", small_student(), {"steps": "0"})
    recipe = replace(export_recipe(tmp_path, tmp_path / "s.safetensors"), stage="all")
    assert export(recipe, accelerator) is False
    assert "the student was not trained" in capsys.readouterr().out


def test_the_exit_code_of_an_export_that_is_wrong_is_1(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnx_encoder, "FLOAT32", Bounds(max_difference=0.0))
    checkpoint = f"checkpoint={finished_run / 'run' / 'student.safetensors'}"
    assert main([*TINY, *places(tmp_path, "gone.tar"), "stage=export", checkpoint]) == 1
    said = capsys.readouterr().err
    assert said.startswith("distill.py: encoder.onnx differs from PyTorch: by ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("repvit_m2_3", "RepViTM23"),
        ("tiny_vit_5m", "TinyViT5m"),
        ("repvit_m1_0-fuse", "RepViTM10Fuse"),
        ("mobile_sam", "MobileSAM"),
        ("convnext_atto", "ConvNeXtAtto"),
        ("21k.model", "Student21kModel"),
    ],
)
def test_packages_are_called_as_swift_calls_classes(name: str, expected: str) -> None:
    assert subject.class_name(name) == expected
    assert folder.file_name("Encoder_8bit.mlpackage", expected) == f"{expected}Encoder_8bit.mlpackage"
    assert folder.file_name("encoder.onnx", expected) == "encoder.onnx"


def test_a_name_or_licence_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "recipe=quickstart", "export.name=my-model")
    assert "export.name=my-model is no name of a class" in said
    for text in ("", " mit", "mit\n- Licence: another"):
        said = refused(capsys, "recipe=quickstart", f"export.license={text}")
        assert "is no licence: one line, as apache-2.0" in said


def test_what_nobody_asked_for_by_name_may_be_left_out(tmp_path: Path) -> None:
    """Files of few bits, under `all`: those that are no good, or no faster."""

    def makes(**entry: Any) -> folder.Make:
        def make(path: Path) -> dict[str, Any]:
            path.write_text("a file")
            return {"precision": "int8", "parity": {"max_difference": 0.1, "mask_miou": 0.99}, **entry}

        return make

    def bad(path: Path) -> dict[str, Any]:
        raise ParityError(f"{path.name} differs from PyTorch: mask mIoU 0.9, allowed is at least 0.98")

    names = ("good", "slow", "bad", "asked", "bad_asked")
    functions = (makes(times_as_fast=1.3), makes(times_as_fast=0.9), bad, makes(times_as_fast=0.9), bad)
    said: list[str] = []
    paths = dict(zip((tmp_path / name for name in names), functions, strict=True))
    files, failures, left_out = folder.make_files(paths, names[:3], said.append)
    assert set(files) == {"good", "asked"} == {path.name for path in tmp_path.iterdir()}
    assert list(left_out) == ["slow", "bad"]
    assert [line.split()[0] for line in failures] == ["bad_asked"]
    assert any("slow is 0.9 times as fast as encoder.onnx here; it is left out" in line for line in said)


def test_the_worst_masks_are_bounded_too() -> None:
    """A mean of 0.985 may hide that every tenth mask is another one."""
    ious = [1.0] * 90 + [0.85] * 10
    told = proof.spread(ious)
    assert told == {"mask_miou": 0.985, "mask_iou_p5": 0.85, "masks_below_0.9": 0.1}
    parity = {"relative_error": 0.01, **told}
    with pytest.raises(ParityError, match=r"5th percentile of masks' IoUs 0.85, allowed is at least 0.9"):
        proof.within("encoder_int8.onnx", parity, proof.COMPRESSED)
    assert proof.within("x", {**parity, "mask_iou_p5": 0.91}, proof.COMPRESSED)["allowed"]["mask_iou_p5"] == 0.9


def test_what_was_left_out_is_remembered_and_the_page_goes_with_its_settings(tmp_path: Path) -> None:
    """What can stay of an earlier export, whatever other formats are asked for now."""
    made_from = {"student_sha256": "s", "export": {"opset": 17, "formats": ["onnx", "web"]}, "page": {"points": 16}}
    left_out = {"encoder_int8.onnx": "encoder_int8.onnx is no faster"}
    (tmp_path / "encoder.onnx").touch()
    (tmp_path / "web").mkdir()
    (tmp_path / "OldEncoder.mlpackage").mkdir()
    manifest = {"files": {"encoder.onnx": {}, "web": {}}, "left_out": left_out, "made_from": made_from}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    fewer = {**made_from, "export": {"opset": 17, "formats": ["huggingface"]}, "page": None}
    assert folder.clear(tmp_path, fewer) == ({"encoder.onnx": {}, "web": {}}, left_out)
    assert folder.clear(tmp_path, made_from) == ({"encoder.onnx": {}, "web": {}}, left_out)
    assert folder.clear(tmp_path, {**made_from, "page": {"points": 5}}) == ({"encoder.onnx": {}}, left_out)
    assert folder.clear(tmp_path, {**made_from, "student_sha256": "t"}) == ({}, {})
    assert not list(tmp_path.iterdir())  # a package of another name, too


@pytest.mark.slow
def test_what_an_earlier_student_left_goes_first(finished_run: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    directory = tmp_path / "run" / "export"
    (directory / "Encoder.mlpackage").mkdir(parents=True)
    (directory / "decoder.onnx").touch()
    (directory / "repvit_sam.pt").touch()  # of stage=convert
    export(export_recipe(tmp_path, finished_run / "run" / "student.safetensors"), accelerator)
    assert sorted(path.name for path in directory.iterdir()) == [
        "README.md", "encoder.onnx", "manifest.json", "repvit_sam.pt",
    ]  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `distill.py stage=export` says: one line, exit code 2."""
    assert main(["stage=export", *arguments]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    return said


def test_bad_input_is_one_line(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = finished_run / "run" / "student.safetensors"
    assert "onnx_fp61 is not known; did you mean 'onnx_fp16'?" in refused(
        capsys, f"checkpoint={good}", "export.formats=[onnx_fp61]"
    )
    assert "no student at gone.safetensors" in refused(capsys, "checkpoint=gone.safetensors")
    half = tmp_path / "half.safetensors"
    half.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    assert "half.safetensors is not a readable safetensors file" in refused(capsys, f"checkpoint={half}")
    halved = tmp_path / "half.pt"
    torch.save({"a": torch.zeros(9)}, halved)
    halved.write_bytes(halved.read_bytes()[:200])
    assert "half.pt" in refused(capsys, f"checkpoint={halved}")
    save_student(tmp_path / "untrained.safetensors", small_student(), {"steps": "0"})
    said = refused(capsys, *TINY, *places(tmp_path, "gone.tar"), "checkpoint=untrained.safetensors")
    assert "untrained.safetensors was not trained" in said
    save_student(tmp_path / "odd.safetensors", small_student(), {"recipe": "a: ["})
    assert "odd.safetensors is not valid YAML" in refused(capsys, "checkpoint=odd.safetensors")
    save_student(tmp_path / "odd.safetensors", small_student(), {"recipe": "data: null"})
    assert "data is None" in refused(capsys, "checkpoint=odd.safetensors")
    assert "export.formats=[] names no file to make" in refused(capsys, f"checkpoint={good}", "export.formats=[]")
    other = create_student("repvit_m0_9", 128, 64, widths=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    save_student(tmp_path / "narrow.safetensors", other, {})
    said = refused(capsys, *TINY, *places(tmp_path, "gone.tar"), "checkpoint=narrow.safetensors")
    assert "the encoder makes 64 channels, the decoder takes 128" in said


def test_a_decoder_needs_the_teachers_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_student(tmp_path / "s.safetensors", small_student(), {})
    asked = ["recipe=repvit_m2_3", f"run_dir={tmp_path / 'run'}", "checkpoint=s.safetensors"]
    said = refused(capsys, *asked, "export.formats=[onnx, onnx_decoder, onnx_int8]")
    assert (
        "onnx_int8, onnx_decoder needs the teacher's mask decoder: checkpoints/sam_vit_h_4b8939.pth is not there"
        in said
    )
    assert main(["stage=export", *asked, "export.formats=[onnx]"]) == 0  # embeddings alone are compared
    manifest = json.loads((tmp_path / "run" / "export" / "manifest.json").read_text())
    assert manifest["files"]["encoder.onnx"]["parity"]["mask_miou"] is None


def test_without_coremltools_the_formats_that_need_it_are_named(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subject, "find_spec", lambda name: None)
    said = refused(capsys, f"checkpoint={finished_run / 'run' / 'student.safetensors'}", "export.formats=[all]")
    assert (
        "coreml, coreml_8bit, coreml_6bit, coreml_6bit_grouped, coreml_4bit, coreml_decoder_8bit needs coremltools"
        in said
    )


@pytest.mark.slow
def test_formats_that_cannot_be_made_cost_their_own_files(
    finished_run: Path,
    scene_tar: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """coremltools without what writes packages, as where there is no wheel of it, and a converter that raises whatever
    it likes; in all stages, for the report is still to come."""

    def fail(*arguments: object) -> None:
        raise RuntimeError("of a converter's own")

    monkeypatch.setitem(sys.modules, "coremltools.libmilstoragepython", None)
    monkeypatch.setattr(makers, "export_onnx_decoder", fail)
    run = Path(shutil.copytree(finished_run / "run", tmp_path / "run"))
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "report")
    images, _, cache = places(finished_run, scene_tar)
    code = main([*TINY, images, cache, f"run_dir={run}", "export.formats=[onnx, onnx_decoder, coreml]"])
    said = capsys.readouterr().err
    assert code == 1
    last = said.strip().splitlines()[-1]
    assert "Encoder.mlpackage cannot be written: coremltools " in last
    assert "has no compiled parts for Python" in last
    assert "decoder.onnx could not be made: RuntimeError: of a converter's own" in last
    assert "in fail" in said  # where that happened
    assert "InputError" not in said
    manifest = json.loads((run / "export" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"encoder.onnx"}
    assert len(manifest["failures"]) == 4
    assert (run / "report" / "index.html").exists()


@pytest.mark.slow
def test_nothing_of_coremltools_is_loaded_until_it_is_needed() -> None:
    """It takes seconds."""
    code = (
        "import sys; from distill.schema import ON_REQUEST, STAGES; from distill.stages import find_stage; "
        "all(map(find_stage, (*STAGES, *ON_REQUEST))); "
        "sys.exit(any(name.startswith('coremltools') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
