"""`export/README.md`: what it says of an export, whatever was exported."""

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from distill.export.coreml.encoder import PADDING_COLOUR
from distill.export.files import digest
from distill.export.handover.readme import write_readme
from distill.export.programs import write_programs
from distill.schema import FORMATS
from embeddings_cache.system.files import write_json
from support import ROOT

SIZE = 128
"""Of the shared run's student."""


def code(readme: str, language: str) -> str:
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    return block


def manifest_of(finished_run: Path, formats: tuple[str, ...]) -> dict[str, Any]:
    """The manifest of an export of other formats: each file as one of the real export is described."""
    manifest = json.loads((finished_run / "run" / "export" / "manifest.json").read_text())
    entry = manifest["files"]["encoder.onnx"]
    files = {name: entry for kind in formats for name in FORMATS[kind]}
    programs = {"segment.py": {"sha256": "0"}} if {"encoder.onnx", "decoder.onnx"} <= files.keys() else {}
    return {**manifest, "files": files, "beside": programs}


def rendered(manifest: dict[str, Any], directory: Path) -> str:
    write_readme(directory / "README.md", manifest)
    return (directory / "README.md").read_text(encoding="utf-8")


def sections(readme: str) -> list[str]:
    return re.findall(r"^## (.+)$", readme, re.MULTILINE)


def test_the_readme_names_every_file_and_the_image_size(finished_run: Path, tmp_path: Path) -> None:
    manifest = manifest_of(finished_run, ("onnx", "onnx_fp16", "onnx_decoder", "coreml"))
    readme = rendered(manifest, tmp_path)
    for name in manifest["files"]:
        assert f"| `{name}` |" in readme
    assert f"images of {SIZE} px" in readme
    assert "1024" not in readme
    assert "failed" not in readme


def test_an_export_has_its_readme(finished_run: Path) -> None:
    export = finished_run / "run" / "export"
    readme = (export / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in readme for name in json.loads((export / "manifest.json").read_text())["files"])


def test_the_swift_code_names_the_packages_that_are_there(finished_run: Path, tmp_path: Path) -> None:
    """Where there are several, those that are not compressed."""
    manifest = manifest_of(finished_run, ("coreml", "coreml_8bit", "coreml_decoder_8bit"))
    manifest["files"] = {f"Mine{name}": entry for name, entry in manifest["files"].items()}
    readme = rendered(manifest, tmp_path)
    assert re.findall(r'forResource: "(\w+)"', code(readme, "swift")) == ["MineEncoder", "MineDecoder"]
    assert f"{(SIZE // 4) ** 2 * 4} numbers" in readme
    assert "Swift" not in sections(rendered(manifest_of(finished_run, ("onnx",)), tmp_path))


def test_the_swift_package_pads_with_the_colour_that_the_encoder_expects() -> None:
    red, green, blue = PADDING_COLOUR
    text = (ROOT / "distill" / "clients" / "swift" / "Sources" / "SegmentAnything" / "Resizing.swift").read_text()
    assert f"(blue: UInt8, green: UInt8, red: UInt8) = ({blue}, {green}, {red})" in text


def test_the_readme_is_whole_markdown_whatever_was_exported(finished_run: Path, tmp_path: Path) -> None:
    for count in (0, 1, 2, len(FORMATS)):
        for formats in combinations(FORMATS, count):
            readme = rendered(manifest_of(finished_run, formats), tmp_path)
            assert not re.search(r"\{\{|\}\}|\{%|%\}|\{#", readme)
            assert readme.endswith("\n")
            assert readme.count("\n```") % 2 == 0
            prose = re.sub(r"^```.*?^```$", "```", readme, flags=re.DOTALL | re.MULTILINE)
            assert "\n\n\n" not in prose
            assert "None" not in prose
            assert all(line == line.rstrip() for line in readme.splitlines())
            assert not re.search(r"[^\n]\n(#|```|\| file)|\n#.*\n[^\n]|\n```\n[^\n]", prose)
            tables = re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE)
            assert all(len({row.count("|") for row in table.splitlines()}) == 1 for table in tables)
            named = [row.split("`")[1] for row in tables[0].splitlines()[2:]]
            assert named == [name for kind in formats for name in FORMATS[kind]]


def test_tensorrt_gets_the_files_that_were_made_for_it(finished_run: Path, tmp_path: Path) -> None:
    readme = rendered(manifest_of(finished_run, ("onnx", "onnx_decoder", "onnx_trt")), tmp_path)
    lines = [line for line in readme.splitlines() if line.startswith("trtexec")]
    assert [line.split()[1] for line in lines] == ["--onnx=encoder_trt.onnx", "--onnx=decoder_trt.onnx"]
    assert all("--stronglyTyped" in line for line in lines)
    assert f"mask_input:64x1x{SIZE // 4}x{SIZE // 4},has_mask_input:64" in readme


@pytest.mark.parametrize("kind", ["onnx_fp16", "onnx_int8"])
def test_what_is_said_names_the_encoder_that_is_there(kind: str, finished_run: Path, tmp_path: Path) -> None:
    (name,) = FORMATS[kind]
    manifest = manifest_of(finished_run, (kind, "onnx_decoder"))
    manifest["beside"] = write_programs(tmp_path, manifest["files"])
    readme = rendered(manifest, tmp_path)
    assert f"trtexec --onnx={name} " in readme
    for text in (readme, *((tmp_path / program).read_text("utf-8") for program in manifest["beside"])):
        assert "encoder.onnx" not in text
    for program in ("segment.py", "segment.mjs", "segment.html"):
        assert name in (tmp_path / program).read_text("utf-8")


def test_programs_lie_only_beside_what_they_run(tmp_path: Path) -> None:
    assert write_programs(tmp_path, ["encoder.onnx", "decoder_multimask.onnx"]) == {}
    assert write_programs(tmp_path, ["encoder_trt.onnx", "decoder.onnx"]) == {}
    assert not any(tmp_path.iterdir())
    written = write_programs(tmp_path, ["encoder.onnx", "decoder.onnx"])
    assert {path.name for path in tmp_path.iterdir()} == written.keys() >= {"segmenter.py", "resize.mjs"}
    for name, entry in written.items():
        assert entry["sha256"] == digest(tmp_path / name)
    assert write_programs(tmp_path, ["encoder.onnx"]) == {}  # the decoder is gone
    assert not any(tmp_path.iterdir())


def test_the_readme_explains_only_what_was_exported(finished_run: Path, tmp_path: Path) -> None:
    def of(*formats: str) -> list[str]:
        return sections(rendered(manifest_of(finished_run, formats), tmp_path))

    first, last = (
        ["What it is, and what it is not for", "Which file for what", "What they take and give"],
        "Checking what arrived",
    )
    image, runtimes = "How an image goes in", "Which runtimes"
    assert of("onnx") == [*first, "How fast", image, runtimes, "TensorRT", last]
    assert of("coreml_8bit") == [first[0], first[2], "How fast", image, last]
    assert of("coreml") == [*first, "How fast", image, "Which mask", "Swift", last]
    programs = ["Which mask", "Masks for a screen, and odd prompts", "Python", "JavaScript", runtimes, "TensorRT"]
    assert of("onnx", "onnx_decoder") == [*first, "How fast", image, *programs, last]
    assert "Other programs" in of("onnx", "label_studio")
    uses = rendered(manifest_of(finished_run, ("coreml", "coreml_6bit", "onnx_decoder")), tmp_path)
    section = uses.split("## Which file for what\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| (\w+).* \| (.+) \|$", section, re.MULTILINE)[1:] == [
        ("iPhone", "`Encoder.mlpackage`, `Decoder.mlpackage`"),
        ("iPhone", "`Encoder_6bit.mlpackage`"),
    ]
    assert "ONNX" not in rendered(manifest_of(finished_run, ("coreml",)), tmp_path)


def test_the_readme_says_what_failed(finished_run: Path, tmp_path: Path) -> None:
    failures = ["encoder_int8.onnx differs from PyTorch: mask mIoU 0.9, allowed is at least 0.98", "another"]
    readme = rendered({**manifest_of(finished_run, ("onnx",)), "failures": failures}, tmp_path)
    assert f"\n\n- {failures[0]}\n- {failures[1]}\n\n" in readme


def test_dynamic_batches_are_told_to_tensorrt(finished_run: Path, tmp_path: Path) -> None:
    manifest = manifest_of(finished_run, ("onnx",))
    assert "export.dynamic_batch=true" in rendered(manifest, tmp_path)
    manifest["files"]["encoder.onnx"]["inputs"]["image"]["shape"][0] = "N"
    readme = rendered(manifest, tmp_path)
    assert f"--maxShapes=image:8x3x{SIZE}x{SIZE}" in readme
    assert "export.dynamic_batch" not in readme


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
def test_the_readmes_sums_are_right(finished_run: Path, tmp_path: Path) -> None:
    """Those of files, and those of packages as the manifest has them."""
    manifest = manifest_of(finished_run, ("onnx", "coreml"))
    shutil.copy(finished_run / "run" / "export" / "encoder.onnx", tmp_path)
    for package in ("Encoder.mlpackage", "Decoder.mlpackage"):
        for number, name in enumerate(("Manifest.json", "Data/b/weight.bin", "Data/a.mlmodel", "Data/B.txt")):
            file = tmp_path / package / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{package} {number}")
        of_package = {"format": "coreml", "sha256": digest(tmp_path / package)}
        manifest["files"][package] = {**manifest["files"][package], **of_package}
    write_json(tmp_path / "manifest.json", manifest)
    block = code(rendered(manifest, tmp_path).split("## Checking what arrived")[1], "bash")
    done = subprocess.run(["bash", "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    packages = [entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".mlpackage")]
    assert done.stdout.splitlines() == ["encoder.onnx: OK", *(f"{found}  -" for found in packages)]
