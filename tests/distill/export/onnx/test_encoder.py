from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from segment_anything import SamPredictor
from torch import nn
from torch.nn.functional import interpolate

from distill.export.encoder import RgbEncoder, pad_with_mean_colour
from distill.export.onnx.encoder import encoder_model, export_onnx_encoder
from distill.export.onnx.file import open_session
from distill.export.proof import ParityError
from distill.export.substitutes import bicubic
from embeddings_cache.images.preprocessing import resize_longest_side
from embeddings_cache.images.scenes import generate_scene
from exports import onnx_of, reference, reference_of, small_student, toy
from students import InputError, StudentEncoder, build_student_sam
from support import ROOT


def export(encoder: StudentEncoder, path: Path, float16: bool = False, dynamic_batch: bool = False) -> dict:
    model = encoder_model(RgbEncoder(encoder).eval(), dynamic_batch)
    return export_onnx_encoder(model, reference(encoder), path, float16)


def run(path: Path, image: np.ndarray) -> np.ndarray:
    return open_session(path).run(["image_embeddings"], {"image": image})[0]


@pytest.mark.parametrize(
    ("name", "downsample"),
    [
        ("repvit_m0_9", "stride1"),
        ("repvit_m0_9", "fuse"),
        ("tiny_vit_5m", "stride1"),
        pytest.param("tiny_vit_5m", "fuse", marks=pytest.mark.slow),
    ],
)
def test_onnx_equals_the_predictors_embedding_at_every_aspect(name: str, downsample: str, tmp_path: Path) -> None:
    """The whole way: what SamPredictor makes of an image, and what the file makes of it padded with the mean colour."""
    path = tmp_path / "encoder.onnx"
    described = export_onnx_encoder(onnx_of(name, downsample), reference_of(name, downsample), path)
    predictor = SamPredictor(build_student_sam(small_student(name, downsample), toy()))
    for height, width in ((150, 150), (100, 190), (190, 60), (3, 150), (1, 1)):
        image = generate_scene(np.random.default_rng(1), 300)[0][:height, :width]
        predictor.set_image(image)
        embedding = run(path, pad_with_mean_colour(resize_longest_side(image, 128), 128))
        np.testing.assert_allclose(embedding, predictor.get_image_embedding().numpy(), atol=1e-4)
    assert described["parity"]["max_difference"] < 1e-4
    assert described["parity"]["mask_miou"] > 0.999
    assert described["inputs"]["image"]["shape"] == [1, 3, 128, 128]
    assert described["outputs"]["image_embeddings"]["shape"] == [1, 128, 8, 8]


def test_the_file_is_one_plain_onnx_model_that_does_not_say_where_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    described = export_onnx_encoder(onnx_of(), reference_of(), path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["image_embeddings"]
    assert next(o.version for o in model.opset_import if o.domain == "") == described["opset"]
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.onnx"]
    assert str(ROOT).encode() not in path.read_bytes()


@pytest.mark.slow
def test_float16_halves_the_file_and_keeps_its_types(tmp_path: Path) -> None:
    model, compared = onnx_of("tiny_vit_5m"), reference_of("tiny_vit_5m")
    export_onnx_encoder(model, compared, tmp_path / "encoder.onnx")
    described = export_onnx_encoder(model, compared, tmp_path / "encoder_fp16.onnx", float16=True)
    whole, half = ((tmp_path / name).stat().st_size for name in ("encoder.onnx", "encoder_fp16.onnx"))
    assert half < 0.65 * whole
    onnx.checker.check_model(tmp_path / "encoder_fp16.onnx", full_check=True)
    session = open_session(tmp_path / "encoder_fp16.onnx")
    assert {entry.type for entry in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float)"}
    assert 1e-5 < described["parity"]["relative_error"] < 1e-2  # not a copy of the float32 file


@pytest.mark.parametrize("float16", [pytest.param(False, marks=pytest.mark.slow), True])
def test_large_activations_before_the_neck_do_not_overflow(float16: bool, tmp_path: Path) -> None:
    """segment-anything's LayerNorm2d squares them: beyond 255 that is infinite in float16, and the embedding 0."""
    encoder = small_student()
    with torch.no_grad():
        encoder.neck[0].weight *= 300
        encoder.neck[2].weight *= 300
    described = export(encoder, tmp_path / "encoder.onnx", float16)
    assert described["parity"]["relative_error"] < 5e-3


@pytest.mark.slow
def test_a_dynamic_batch_gives_what_single_images_give(tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    described = export(small_student("tiny_vit_5m"), path, dynamic_batch=True)
    assert described["inputs"]["image"]["shape"] == ["N", 3, 128, 128]
    images = np.random.default_rng(0).uniform(0, 255, (3, 3, 128, 128)).astype(np.float32)
    singly = np.concatenate([run(path, image[None]) for image in images])
    np.testing.assert_allclose(run(path, images), singly, atol=1e-5)


class Forgetful(RgbEncoder):
    """Leaves the normalisation out."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.encoder(image)


@pytest.mark.slow
def test_an_export_that_is_wrong_is_not_kept(tmp_path: Path) -> None:
    model = encoder_model(Forgetful(small_student()).eval())
    with pytest.raises(
        ParityError, match=r"^encoder\.onnx differs from PyTorch: by [\d.]+, allowed is at most 0\.001$"
    ):
        export_onnx_encoder(model, reference_of(), tmp_path / "encoder.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_becomes_nan_is_a_difference(tmp_path: Path) -> None:
    encoder, compared = small_student(), reference_of()
    with torch.no_grad():
        encoder.neck[0].weight[0, 0] = torch.nan
    with pytest.raises(ParityError, match="differs from PyTorch: by nan"):
        export_onnx_encoder(encoder_model(RgbEncoder(encoder).eval()), compared, tmp_path / "encoder.onnx")
    with pytest.raises(InputError, match="makes numbers of sa_0 that are not finite"):
        reference(encoder)


def test_what_no_file_can_hold_is_said_before_it_is_made() -> None:
    class Huge(nn.Module):
        img_size = 128

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2**29 + 1, device="meta"))

    with pytest.raises(InputError, match="more weights than one ONNX file holds"):
        encoder_model(RgbEncoder(Huge()))


def test_doubling_is_pytorchs_bicubic_interpolation() -> None:
    for shape in ((2, 5, 8, 6), (1, 3, 1, 1), (1, 1, 2, 9)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = interpolate(x, scale_factor=2, mode="bicubic")
        torch.testing.assert_close(bicubic(2)(x), expected, atol=1e-5, rtol=0)
