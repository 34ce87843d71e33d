import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from accelerate import Accelerator
from segment_anything import SamPredictor
from torch import nn

from distill.export import onnx as module
from distill.export.encoder import pad_with_mean_colour
from distill.export.onnx import export_onnx_encoder
from distill.export.stage import export
from distill.recipe import load_recipe
from embeddings_cache.files import sha256
from embeddings_cache.preprocess import resize_longest_side
from embeddings_cache.scenes import generate_scene
from embeddings_cache.teacher import load_teacher
from students import InputError, StudentEncoder, build_student_sam, create_student, load_student, save_student
from support import TINY, places


def student(name: str = "repvit_m0_9", **numbers: object) -> StudentEncoder:
    """A student with norms as after training, for at their initial values half of the graph does nothing."""
    torch.manual_seed(0)
    numbers = numbers or {"widths": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    encoder = create_student(name, image_size=128, embed_dim=128, **numbers)
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            layer.running_mean.uniform_(-0.3, 0.3)
            layer.running_var.uniform_(0.5, 1.5)
    return encoder.eval()


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    scene = generate_scene(np.random.default_rng(0), 300)[0]
    return [resize_longest_side(scene[:height, :width], 128) for height, width in sizes]


def run_onnx(path: Path, image: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image.numpy()})[0]


@pytest.mark.parametrize("name", ["repvit_m0_9", "tiny_vit_5m"])
def test_onnx_equals_the_predictors_embedding_at_every_aspect(name: str, tmp_path: Path) -> None:
    """The whole way: what SamPredictor makes of an image, and what the file makes of it padded with the mean colour."""
    encoder = student() if name.startswith("repvit") else student(name, depths=[1, 1, 1, 1])
    path = tmp_path / "encoder.onnx"
    described = export_onnx_encoder(encoder, path, pictures((150, 150)))
    predictor = SamPredictor(build_student_sam(encoder, load_teacher("toy", None, 128)))
    for height, width in ((150, 150), (100, 190), (190, 60), (3, 150), (1, 1)):
        image = generate_scene(np.random.default_rng(1), 300)[0][:height, :width]
        predictor.set_image(image)
        embedding = run_onnx(path, pad_with_mean_colour(resize_longest_side(image, 128), 128))
        np.testing.assert_allclose(embedding, predictor.get_image_embedding().numpy(), atol=1e-4)
    assert described["parity"]["max_difference"] < 1e-4
    assert described["inputs"]["image"]["shape"] == [1, 3, 128, 128]
    assert described["outputs"]["image_embeddings"]["shape"] == [1, 128, 8, 8]


def test_the_file_is_one_plain_onnx_model(tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    export_onnx_encoder(student(), path, pictures((100, 100)))
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["image_embeddings"]
    assert next(o.version for o in model.opset_import if o.domain == "") == 18
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.onnx"]


def test_the_unchanged_decoder_takes_its_output(tmp_path: Path) -> None:
    encoder, path = student(), tmp_path / "encoder.onnx"
    export_onnx_encoder(encoder, path, pictures((100, 100)))
    image = generate_scene(np.random.default_rng(2), 200)[0]
    predictor = SamPredictor(build_student_sam(encoder, load_teacher("toy", None, 128)))
    predictor.set_image(image)
    box = np.array([20, 30, 120, 110])
    expected = predictor.predict(box=box, multimask_output=False)[0]
    predictor.features = torch.from_numpy(run_onnx(path, pad_with_mean_colour(resize_longest_side(image, 128), 128)))
    masks = predictor.predict(box=box, multimask_output=False)[0]
    assert (masks == expected).mean() > 0.999


def test_an_export_that_is_wrong_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(module.RgbEncoder):
        """Leaves the normalisation out."""

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.encoder(image)

    monkeypatch.setattr(module, "RgbEncoder", Forgetful)
    with pytest.raises(InputError, match=r"encoder\.onnx differs from PyTorch by"):
        export_onnx_encoder(student(), tmp_path / "encoder.onnx", pictures((100, 100)))
    assert list(tmp_path.iterdir()) == []


def test_nan_is_a_difference(tmp_path: Path) -> None:
    encoder = student()
    with torch.no_grad():
        encoder.neck[0].weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="differs from PyTorch by nan"):
        export_onnx_encoder(encoder, tmp_path / "encoder.onnx", pictures((100, 100)))


def test_manifest_describes_the_files(finished_run: Path) -> None:
    directory = finished_run / "run" / "export"
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["student"] == {"name": "repvit_m0_9", "image_size": 128, "embed_dim": 128}
    assert set(manifest["files"]) == {"encoder.onnx"}
    entry = manifest["files"]["encoder.onnx"]
    assert entry["sha256"] == sha256(directory / "encoder.onnx")
    assert entry["bytes"] == (directory / "encoder.onnx").stat().st_size
    assert entry["inputs"]["image"]["padding_colour"] == [123.675, 116.28, 103.53]
    assert entry["parity"]["max_difference"] <= entry["parity"]["allowed"]


def test_any_student_can_be_exported_without_its_cache(
    finished_run: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    checkpoint = finished_run / "run" / "student.safetensors"
    recipe = load_recipe([*TINY, *places(tmp_path, "gone.tar"), "stage=export", f"checkpoint={checkpoint}"])
    export(recipe, accelerator)
    path = tmp_path / "run" / "export" / "encoder.onnx"
    picture = pictures((120, 90))[0]
    expected = load_student(checkpoint)(module_input(picture)).detach().numpy()
    np.testing.assert_allclose(run_onnx(path, pad_with_mean_colour(picture, 128)), expected, atol=1e-4)

    path.unlink()
    export(recipe, accelerator)  # a file that was removed is made again
    assert path.exists()
    before = path.stat().st_mtime_ns
    export(replace(recipe, train=replace(recipe.train, epochs=99)), accelerator)  # does not concern the export
    assert path.stat().st_mtime_ns == before


def test_a_cache_of_another_size_is_no_hindrance(finished_run: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    encoder = create_student("repvit_m0_9", 192, 64, widths=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    save_student(tmp_path / "s.safetensors", encoder, {})
    recipe = load_recipe([*TINY, *places(finished_run, "gone.tar"), "stage=export"])
    recipe = replace(recipe, run_dir=str(tmp_path / "run"), checkpoint=str(tmp_path / "s.safetensors"))
    export(recipe, accelerator)
    manifest = json.loads((tmp_path / "run" / "export" / "manifest.json").read_text())
    assert manifest["files"]["encoder.onnx"]["inputs"]["image"]["shape"] == [1, 3, 192, 192]


def module_input(picture: np.ndarray) -> torch.Tensor:
    """Normalised and padded by segment-anything's own `Sam.preprocess`."""
    return load_teacher("toy", None, 128).preprocess(torch.from_numpy(picture).permute(2, 0, 1))[None]
