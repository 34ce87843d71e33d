"""The code that an export's README hands out is cut out of it and run: in Python, and in JavaScript where Node is
installed. `SamPredictor` around the student says what it has to come to."""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from distill.evaluate.ious import mask_iou
from distill.export.coreml.encoder import PADDING_COLOUR
from distill.export.files import digest
from distill.export.handover.readme import write_readme
from distill.export.onnx.decoder import run_decoder
from distill.export.onnx.encoder import onnx_encode
from distill.export.onnx.file import open_session
from distill.schema import FORMATS
from embeddings_cache.images.preprocessing import PIXEL_MEAN, pad_pixels, resize_longest_side, to_encoder_input
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.system.files import write_json
from embeddings_cache.teacher.loading import load_teacher
from students import build_student_sam, load_student, read_metadata, save_student
from support import ROOT, Cli

SIZE = 128
"""Of the shared run's student."""

RUNTIMES = ("onnxruntime-node", "onnxruntime-web")
RUNTIMES_VERSION = "1.30.0"

needs_node = pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="needs Node and npm")

IMAGES = {"landscape": (150, 209), "portrait": (190, 60), "square": (128, 128), "strip": (31, 977), "dot": (1, 1)}
"""Height and width."""

PLAIN = """
export const plain = ({ type, dims, data }) =>
  ({ type, dims, data: Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("base64") });
"""
"""A tensor as JSON."""

DRIVER = """
import { readFileSync, writeFileSync } from "node:fs";
import { plain } from "./plain.mjs";
import { embed, resized, segment } from "./segment.mjs";

const results = [];
for (const { pixels, width, height, prompts } of JSON.parse(readFileSync("images.json"))) {
  const input = resized(width, height);
  const embedding = await embed(Buffer.from(pixels, "base64"), ...input);
  const answers = [];
  for (const { points, again } of prompts)
    answers.push(await segment(embedding, points, width, height, again ? answers.at(-1).low_res_masks : undefined));
  const shown = answers.map((answer) => Object.fromEntries(Object.entries(answer).map(([k, v]) => [k, plain(v)])));
  results.push({ input, embedding: plain(embedding), answers: shown });
}
writeFileSync("results.json", JSON.stringify(results));
"""


@dataclass
class Click:
    """A prompt as `SamPredictor.predict` takes it; `again`: with the low-resolution mask of the answer before."""

    prompt: dict[str, np.ndarray]
    again: bool = False

    def points(self) -> list[list[float]]:
        """As the README's JavaScript takes it."""
        coords, labels = self.prompt.get("point_coords", []), self.prompt.get("point_labels", [])
        points = [[*map(float, xy), int(label)] for xy, label in zip(coords, labels, strict=True)]
        if "box" in self.prompt:
            x0, y0, x1, y1 = map(float, self.prompt["box"])
            points += [[x0, y0, 2], [x1, y1, 3]]
        return points


def clicks(height: int, width: int) -> list[Click]:
    """A point, a box, both, a point on and one off the object, and a third point after these."""
    points = np.array([[0.4, 0.5], [0.8, 0.7], [0.2, 0.6]]) * [width, height]
    box = np.array([0.2 * width, 0.1 * height, 0.8 * width, 0.9 * height])
    one = {"point_coords": points[:1], "point_labels": np.array([1])}
    two = {"point_coords": points[:2], "point_labels": np.array([1, 0])}
    three = {"point_coords": points, "point_labels": np.array([1, 0, 1])}
    return [Click(one), Click({"box": box}), Click({**one, "box": box}), Click(two), Click(three, again=True)]


def picture(height: int, width: int) -> np.ndarray:
    scene, _ = generate_scene(np.random.default_rng(3), 1000)
    return np.ascontiguousarray(np.tile(scene, (1, 2, 1))[:height, :width])


def encoder_input(image: np.ndarray) -> torch.Tensor:
    pixels = resize_longest_side(image, SIZE)
    return to_encoder_input(pad_pixels(pixels, SIZE)[None], torch.tensor([pixels.shape[:2]]))


def beside(folder: Path, directory: Path) -> Path:
    """A directory in which an export's ONNX files lie."""
    directory.mkdir(exist_ok=True)
    for file in folder.glob("*.onnx"):
        (directory / file.name).symlink_to(file)
    return directory


def code(readme: str, language: str) -> str:
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    return block


def array(tensor: dict[str, Any]) -> np.ndarray:
    """A tensor that a driver wrote."""
    data = np.frombuffer(base64.b64decode(tensor["data"]), tensor["type"])
    return data.reshape(tensor["dims"])


def run_node(directory: Path, driver: str, images: list[dict[str, Any]]) -> Any:
    (directory / "plain.mjs").write_text(PLAIN)
    (directory / "driver.mjs").write_text(driver)
    (directory / "images.json").write_text(json.dumps(images))
    done = subprocess.run(["node", "driver.mjs"], cwd=directory, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "results.json").read_text())


def asked(image: np.ndarray, pixels: np.ndarray) -> dict[str, Any]:
    """An image and its prompts for a driver."""
    height, width = image.shape[:2]
    prompts = [{"points": click.points(), "again": click.again} for click in clicks(height, width)]
    encoded = base64.b64encode(np.ascontiguousarray(pixels).tobytes()).decode()
    return {"pixels": encoded, "width": width, "height": height, "prompts": prompts}


def best_mask(predictor: SamPredictor, prompt: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`SamPredictor`'s mask (H, W) and low-resolution logits (1, 4h, 4w): of three after one point alone, else the one
    for clear prompts."""
    ambiguous = len(prompt.get("point_coords", ())) == 1 and "box" not in prompt
    masks, ious, low_res = predictor.predict(**prompt, multimask_output=ambiguous)
    best = int(ious.argmax())
    return masks[best], low_res[best : best + 1]


@pytest.fixture(scope="module")
def checkpoint(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that has learnt these pictures by heart, in seconds: the shared run's finds nothing in them."""
    path = finished_run / "run" / "student.safetensors"
    student = load_student(path).train()
    images = torch.cat([encoder_input(picture(*size)) for size in IMAGES.values()])
    with torch.no_grad():
        embeddings = load_teacher("toy", None, SIZE).image_encoder(images)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(student(images), embeddings).backward()
        optimizer.step()
    learnt = tmp_path_factory.mktemp("learnt") / "student.safetensors"
    save_student(learnt, student.eval(), read_metadata(path))
    return learnt


@pytest.fixture(scope="module")
def folder(checkpoint: Path, cli: Cli) -> Path:
    """An export with the decoders for ONNX."""
    formats = "export.formats=[onnx, onnx_decoder]"
    result = cli("stage=export", f"checkpoint={checkpoint}", formats, "export.images=2", cwd=checkpoint.parent)
    assert result.returncode == 0, result.stderr
    return checkpoint.parent / "runs" / "student" / "export"


@pytest.fixture(scope="module")
def sam(checkpoint: Path) -> Sam:
    return build_student_sam(load_student(checkpoint), load_teacher("toy", None, SIZE)).eval()


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """ONNX Runtime for Node and for browsers. Scripts of packages are not run: one would download CUDA's libraries."""
    directory = tmp_path_factory.mktemp("npm")
    (directory / "package.json").write_text("{}")
    packages = [f"{name}@{RUNTIMES_VERSION}" for name in RUNTIMES]
    command = [shutil.which("npm") or "npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    yield directory / "node_modules"
    shutil.rmtree(directory)  # half a gigabyte


@pytest.fixture
def javascript(folder: Path, node_modules: Path, tmp_path: Path) -> Path:
    """A directory as the README wants it: `segment.mjs`, the files, and the packages."""
    directory = beside(folder, tmp_path / "javascript")
    (directory / "node_modules").symlink_to(node_modules)
    (directory / "segment.mjs").write_text(code((folder / "README.md").read_text(), "javascript"))
    return directory


@pytest.mark.slow
@needs_node
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_javascript_segments_as_python_and_the_predictor_do(
    folder: Path, sam: Sam, javascript: Path, runtime: str
) -> None:
    script = javascript / "segment.mjs"
    script.write_text(script.read_text().replace(RUNTIMES[0], runtime))
    pictures = {name: picture(*size) for name, size in IMAGES.items()}
    resized = {name: resize_longest_side(image, SIZE) for name, image in pictures.items()}
    with_alpha = np.dstack([resized["square"], np.full((SIZE, SIZE), 255, np.uint8)])  # as from a canvas
    given = {**resized, "square": with_alpha}
    results = run_node(javascript, DRIVER, [asked(image, given[name]) for name, image in pictures.items()])

    encode, session = onnx_encode(folder / "encoder.onnx"), open_session(folder / "decoder.onnx")
    student, python = SamPredictor(sam), SamPredictor(sam)
    shares = []
    for (name, image), result in zip(pictures.items(), results, strict=True):
        assert result["input"] == [resized[name].shape[1], resized[name].shape[0]]
        student.set_image(image)
        python.set_image(image)
        python.features = torch.from_numpy(encode(resized[name]))
        embedding = array(result["embedding"])
        np.testing.assert_allclose(embedding, python.features.numpy(), rtol=0, atol=1e-3)
        np.testing.assert_allclose(embedding, student.features.numpy(), rtol=0, atol=1e-3)
        earlier: dict[str, np.ndarray] = {}
        low_res = np.zeros(0)
        for click, answer in zip(clicks(*image.shape[:2]), result["answers"], strict=True):
            found = {key: array(tensor) for key, tensor in answer.items()}
            mine = {"mask_input": earlier["low_res_masks"][0]} if click.again else {}
            earlier = run_decoder(session, python, {**click.prompt, **mine})
            assert found["masks"].shape == (1, 1, *image.shape[:2])
            for key in ("low_res_masks", "iou_predictions"):
                np.testing.assert_allclose(found[key], earlier[key], rtol=0, atol=1e-3)
            sure = np.abs(earlier["masks"]) >= 1e-3
            np.testing.assert_array_equal(found["masks"][sure] > 0, earlier["masks"][sure] > 0)

            expected, low_res = best_mask(student, {**click.prompt, **({"mask_input": low_res} if click.again else {})})
            assert mask_iou(found["masks"][0, 0] > 0, expected) >= 0.99
            shares.append(expected.mean())
    assert 0.1 < np.median(shares) < 0.9  # or there would be nothing to compare


@pytest.mark.slow
def test_the_readmes_python_segments_a_photograph_as_the_predictor_does(folder: Path, sam: Sam, tmp_path: Path) -> None:
    """A photograph that a telephone has marked as lying on its side."""
    directory = beside(folder, tmp_path / "python")
    (directory / "segment.py").write_text(code((folder / "README.md").read_text(), "python"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(picture(190, 60))).save(directory / "photo.jpg", exif=exif)
    command = [sys.executable, "segment.py", "photo.jpg", "24", "95"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

    upright = np.asarray(ImageOps.exif_transpose(Image.open(directory / "photo.jpg")))
    predictor = SamPredictor(sam)
    predictor.set_image(upright)
    expected, _ = best_mask(predictor, {"point_coords": np.array([[24, 95]]), "point_labels": np.array([1])})
    mask = np.asarray(Image.open(directory / "mask.png"))
    assert mask.shape == upright.shape[:2] == (190, 60)
    assert mask_iou(mask, expected) >= 0.99
    assert 0 < expected.mean() < 1
    assert f"{mask.sum()} pixels" in done.stdout


def manifest_of(finished_run: Path, formats: tuple[str, ...]) -> dict[str, Any]:
    """The manifest of an export of other formats: each file as one of the real export is described."""
    manifest = json.loads((finished_run / "run" / "export" / "manifest.json").read_text())
    entry = manifest["files"]["encoder.onnx"]
    return {**manifest, "files": {name: entry for kind in formats for name in FORMATS[kind]}}


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
    for language in ("python", "javascript"):
        assert re.search(rf"\bsize = {SIZE}\b", code(readme, language), re.IGNORECASE)
        assert re.search(rf"\binput = {SIZE}\b", code(readme, language), re.IGNORECASE)
    assert f"MEAN = {PIXEL_MEAN}" in code(readme, "python")
    assert f"MEAN = {list(PIXEL_MEAN)}" in code(readme, "javascript")
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
            rows = re.findall(r"^\|.*$", prose, re.MULTILINE)
            assert {row.count("|") for row in rows} == {6}
            assert [row.split("`")[1] for row in rows[2:]] == [name for kind in formats for name in FORMATS[kind]]


def test_tensorrt_gets_the_files_that_were_made_for_it(finished_run: Path, tmp_path: Path) -> None:
    readme = rendered(manifest_of(finished_run, ("onnx", "onnx_decoder", "onnx_trt")), tmp_path)
    lines = [line for line in readme.splitlines() if line.startswith("trtexec")]
    assert [line.split()[1] for line in lines] == ["--onnx=encoder_trt.onnx", "--onnx=decoder_trt.onnx"]
    assert all("--stronglyTyped" in line for line in lines)
    assert f"mask_input:64x1x{SIZE // 4}x{SIZE // 4},has_mask_input:64" in readme
    assert 'InferenceSession("encoder.onnx")' in code(readme, "python")


def test_the_code_names_the_encoder_that_is_there(finished_run: Path, tmp_path: Path) -> None:
    for kind in ("onnx_fp16", "onnx_int8"):
        (name,) = FORMATS[kind]
        readme = rendered(manifest_of(finished_run, (kind, "onnx_decoder")), tmp_path)
        assert "encoder.onnx" not in readme
        assert f'InferenceSession("{name}")' in code(readme, "python")
        assert f'InferenceSession.create("{name}")' in code(readme, "javascript")
        assert f"trtexec --onnx={name} " in readme


def test_the_readme_explains_only_what_was_exported(finished_run: Path, tmp_path: Path) -> None:
    def of(*formats: str) -> list[str]:
        return sections(rendered(manifest_of(finished_run, formats), tmp_path))

    always = ["How an image goes in", "Checking what arrived"]
    runtimes = "Which runtimes"
    assert of("onnx") == [always[0], runtimes, "TensorRT", always[1]]
    assert of("coreml") == [always[0], "Which mask", "Swift", always[1]]
    programs = ["Which mask", "Python", "JavaScript", runtimes, "TensorRT"]
    assert of("onnx", "onnx_decoder") == [always[0], *programs, always[1]]
    assert "Other programs" in of("onnx", "label_studio")
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
        manifest["files"][package] = {**manifest["files"][package], "sha256": digest(tmp_path / package)}
    write_json(tmp_path / "manifest.json", manifest)
    block = code(rendered(manifest, tmp_path).split("## Checking what arrived")[1], "bash")
    done = subprocess.run(["bash", "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    packages = [entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".mlpackage")]
    assert done.stdout.splitlines() == ["encoder.onnx: OK", *(f"{found}  -" for found in packages)]
