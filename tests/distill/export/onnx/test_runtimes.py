"""Every ONNX file in the oldest runtimes that the README names, in environments of their own, against the newest."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import onnx
import pytest

from distill.export.onnx import picture_encoder_model
from distill.export.onnx.file import open_session
from embeddings_cache.images.scenes import generate_scene
from npm import needs_node, npm_install
from support import Cli

OLD = {"1.15.0": "1.26.4", "1.16.3": "1.26.4"}
"""Versions of ONNX Runtime, and of the NumPy that they were built for; 1.15.0 is the oldest for this Python."""

OLD_JAVASCRIPT = ("onnxruntime-web@1.14.0", "onnxruntime-node@1.14.0")

RUN = """
import json, sys
import numpy as np, onnxruntime
for name, file in json.load(open("files.json")).items():
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    made = session.run(None, dict(np.load(f"{name}.in.npz")))
    np.savez(f"{name}.out.npz", *made)
"""

RUN_JAVASCRIPT = """
import { readFileSync, writeFileSync } from "node:fs";
import ort from "RUNTIME";

const typed = { float32: Float32Array, uint8: Uint8Array };
const files = JSON.parse(readFileSync("files.json"));
for (const [name, file] of Object.entries(files)) {
  const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(file)));
  const feeds = {};
  for (const [input, { dims, type, data }] of Object.entries(JSON.parse(readFileSync(`${name}.in.json`))))
    feeds[input] = new ort.Tensor(type, typed[type].from(data), dims);
  const made = await session.run(feeds);
  const plain = session.outputNames.map((output) => Array.from(made[output].data, Number));
  writeFileSync(`${name}.out.json`, JSON.stringify(plain));
}
"""


@pytest.fixture(scope="module")
def exported(finished_run: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ONNX files of all kinds, by a name: the shared run's student's."""
    directory = tmp_path_factory.mktemp("runtimes")
    shutil.copy(finished_run / "run" / "student.safetensors", directory)
    formats = "export.formats=[onnx, onnx_fp16, onnx_int8, onnx_decoder]"
    result = cli(
        "stage=export", "checkpoint=student.safetensors", formats, "export.images=1", "export.calibration_images=2",
        cwd=directory,
    )  # fmt: skip
    assert result.returncode in (0, 1), result.stderr  # int8 may miss its bounds, and is then not there
    folder = directory / "runs" / "student" / "export"
    for uint8 in (False, True):
        onnx.save(picture_encoder_model(onnx.load(folder / "encoder.onnx"), uint8), folder / f"pictures_{uint8}.onnx")
    return {path.stem: path for path in sorted(folder.glob("*.onnx"))}


def feeds_of(path: Path) -> dict[str, np.ndarray]:
    """A scene, or an embedding and a click without its padding."""
    session = open_session(path)
    given = {entry.name: entry for entry in session.get_inputs()}
    rng = np.random.default_rng(0)
    if "point_coords" in given:
        return {
            "image_embeddings": rng.normal(size=given["image_embeddings"].shape).astype(np.float32),
            "point_coords": np.array([[[40.0, 50.0]]], np.float32),
            "point_labels": np.array([[1.0]], np.float32),
            "mask_input": np.zeros(given["mask_input"].shape, np.float32),
            "has_mask_input": np.zeros(1, np.float32),
            "orig_im_size": np.array([90, 200], np.float32),
        }
    (picture,) = given.values()
    scene = generate_scene(rng, 300)[0]
    if picture.name != "image":
        return {picture.name: scene.astype(np.uint8 if "uint8" in picture.type else np.float32)}
    side = picture.shape[-1]
    return {"image": np.ascontiguousarray(np.tile(scene, (2, 2, 1))[:side, :side].transpose(2, 0, 1)[None], np.float32)}


def agree(name: str, found: list[np.ndarray], path: Path) -> None:
    expected = open_session(path).run(None, feeds_of(path))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        apart = np.linalg.norm(np.reshape(one, other.shape).astype(float) - other.astype(float))
        assert apart <= (0.2 if "int8" in name else 2e-2 if "fp16" in name else 1e-4) * np.linalg.norm(other), name


@pytest.mark.slow
@pytest.mark.parametrize("version", OLD)
def test_old_runtimes_open_and_compute_every_file(version: str, exported: dict[str, Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    packages = [f"onnxruntime=={version}", f"numpy=={OLD[version]}"]
    target = ["--target", str(next((tmp_path / "venv").glob("lib/python*/site-packages")))]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", *target, *packages]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip: {done.stderr.strip().splitlines()[-1]}")
    (tmp_path / "files.json").write_text(json.dumps({name: str(path) for name, path in exported.items()}))
    for name, path in exported.items():
        np.savez(tmp_path / f"{name}.in.npz", **feeds_of(path))
    done = subprocess.run([python, "-c", RUN], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, path in exported.items():
        agree(name, list(np.load(tmp_path / f"{name}.out.npz").values()), path)


@pytest.mark.slow
@needs_node
@pytest.mark.parametrize("package", OLD_JAVASCRIPT)
def test_old_runtimes_in_javascript_too(package: str, exported: dict[str, Path], tmp_path: Path) -> None:
    """CVAT before December 2025 brings onnxruntime-web 1.14. Float16 layer norms it cannot load: 1.15 can."""
    exported = {name: path for name, path in exported.items() if name != "encoder_fp16"}
    npm_install(tmp_path, package)
    (tmp_path / "files.json").write_text(json.dumps({name: str(path) for name, path in exported.items()}))
    for name, path in exported.items():
        plain = {
            key: {"dims": value.shape, "type": str(value.dtype), "data": value.ravel().tolist()}
            for key, value in feeds_of(path).items()
        }
        (tmp_path / f"{name}.in.json").write_text(json.dumps(plain))
    (tmp_path / "run.mjs").write_text(RUN_JAVASCRIPT.replace("RUNTIME", package.split("@")[0]))
    done = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, path in exported.items():
        made = json.loads((tmp_path / f"{name}.out.json").read_text())
        agree(name, [np.array(values) for values in made], path)


@pytest.mark.slow
def test_files_declare_the_opset_that_was_asked_for_and_nothing_else(exported: dict[str, Path]) -> None:
    for name, path in exported.items():
        model = onnx.load(path)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)], name
        assert model.ir_version == 8
        assert {entry.key for entry in model.metadata_props} >= {"fingerprint"}, name
