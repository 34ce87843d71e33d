from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from distill.export.coreml import encoder as coreml
from distill.export.coreml.conversion import compress, convert_decoder, convert_encoder
from distill.export.coreml.decoder import decoder_feeds, export_coreml_decoder
from distill.export.coreml.encoder import PADDING_COLOUR, export_coreml_encoder, pad_with_rounded_mean
from distill.export.coreml.origin import Origin
from distill.export.coreml.program import MilProgram
from distill.export.coreml.weights import Weights
from distill.export.decoder import PromptDecoder
from distill.export.encoder import RgbEncoder
from distill.export.prompts import points_of
from distill.export.proof import Bounds, ParityError
from embeddings_cache.images.preprocessing import PIXEL_MEAN, resize_longest_side
from embeddings_cache.images.scenes import generate_scene
from exports import reference_of, small_student, toy
from students import build_student_sam

ct = pytest.importorskip("coremltools")
FLOAT16, FLOAT32 = 10, 11
"""As MIL's protobuf counts types."""
ORIGIN = Origin("repvit_m0_9", "toy", "quickstart", "Apache-2.0")


@cache
def converted(name: str = "repvit_m0_9", downsample: str = "stride1") -> Any:
    return convert_encoder(RgbEncoder(small_student(name, downsample)).eval())


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def specification(package: Path) -> object:
    return ct.models.MLModel(str(package), skip_model_load=True).get_spec()


@pytest.mark.parametrize(
    ("name", "downsample"),
    [
        ("repvit_m0_9", "stride1"),
        pytest.param("tiny_vit_5m", "stride1", marks=pytest.mark.slow),
        pytest.param("repvit_m0_9", "fuse", marks=pytest.mark.slow),
        pytest.param("tiny_vit_5m", "fuse", marks=pytest.mark.slow),
    ],
)
def test_a_package_makes_the_predictors_embedding(name: str, downsample: str, tmp_path: Path) -> None:
    """From a photograph to the embedding: SamPredictor's way, and a pixel buffer through the saved package."""
    encoder, package = small_student(name, downsample), tmp_path / "Encoder.mlpackage"
    model, compared = converted(name, downsample), reference_of(name, downsample)
    described = export_coreml_encoder(model, compared, package, ORIGIN)
    predictor, program = SamPredictor(build_student_sam(encoder, toy())), MilProgram(package)
    for height, width in ((150, 150), (190, 60), (3, 150)):
        image = generate_scene(np.random.default_rng(1), 300)[0][:height, :width]
        predictor.set_image(image)
        buffer = pad_with_rounded_mean(resize_longest_side(image, 128), 128)
        embedding = program({"image": buffer})["image_embeddings"]
        assert relative_error(embedding, predictor.get_image_embedding().numpy()) < 1e-2
    assert described["parity"]["relative_error"] < 1e-2
    assert described["parity"]["relative_error_in_float32"] < described["parity"]["relative_error"]
    assert described["parity"]["mask_miou"] >= 0.995
    assert [path.name for path in tmp_path.iterdir()] == ["Encoder.mlpackage"]


@pytest.mark.slow
def test_an_app_passes_a_pixel_buffer_and_can_read_what_it_has(tmp_path: Path) -> None:
    package = tmp_path / "Encoder.mlpackage"
    export_coreml_encoder(converted(), reference_of(), package, ORIGIN)
    description = specification(package).description
    (image,), (embedding,) = description.input, description.output
    assert (image.name, embedding.name) == ("image", "image_embeddings")
    kind = image.type.imageType
    assert (kind.width, kind.height, kind.ColorSpace.Name(kind.colorSpace)) == (128, 128, "RGB")
    assert image.shortDescription
    assert embedding.shortDescription
    metadata = description.metadata
    assert metadata.license == "Apache-2.0"
    assert metadata.versionString
    assert {"student": "repvit_m0_9", "teacher": "toy"}.items() <= dict(metadata.userDefined).items()
    assert specification(package).specificationVersion == ct.target.iOS16.value


def test_padding_is_the_mean_colour_as_near_as_8_bits_come() -> None:
    assert np.abs(np.subtract(PADDING_COLOUR, PIXEL_MEAN)).max() <= 0.5
    padded = pad_with_rounded_mean(np.zeros((64, 128, 3), np.uint8), 128)
    assert (padded[0, :, 64:] == np.array(PADDING_COLOUR)[:, None, None]).all()
    assert not padded[0, :, :64].any()


@pytest.mark.slow
def test_compressed_weights_take_less_and_are_compared_too(tmp_path: Path) -> None:
    model, compared = converted("tiny_vit_5m"), reference_of("tiny_vit_5m")
    errors, sizes = [], []
    for bits in (None, 8):
        package = tmp_path / f"Encoder_{bits}.mlpackage"
        parity = export_coreml_encoder(compress(model, Weights(bits)), compared, package, ORIGIN, Weights(bits))[
            "parity"
        ]
        errors.append(parity["relative_error"])
        sizes.append(sum(path.stat().st_size for path in package.rglob("weight.bin")))
    assert sizes[1] < 0.6 * sizes[0]
    assert errors[0] < errors[1] < 0.05


@pytest.mark.slow
def test_six_bits_are_a_palette(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml, "COMPRESSED", Bounds(relative_error=0.2))  # drawn weights have no masks to keep
    package = tmp_path / "Encoder_6bit.mlpackage"
    export_coreml_encoder(compress(converted(), Weights(6)), reference_of(), package, ORIGIN, Weights(6))
    function = specification(package).mlProgram.functions["main"]
    operations = {op.type for op in function.block_specializations[function.opset].operations}
    assert "constexpr_lut_to_dense" in operations


@pytest.mark.slow
def test_a_package_that_is_wrong_is_not_kept(tmp_path: Path) -> None:
    class Forgetful(RgbEncoder):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.encoder(image)

    encoder = small_student()
    with pytest.raises(ParityError, match=r"^Encoder\.mlpackage differs from PyTorch: relative error"):
        export_coreml_encoder(
            convert_encoder(Forgetful(encoder).eval()), reference_of(), tmp_path / "Encoder.mlpackage", ORIGIN
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_earlier_package_gives_way_to_a_new_one(tmp_path: Path) -> None:
    package = tmp_path / "Encoder.mlpackage"
    package.mkdir()
    (package / "old").touch()
    export_coreml_encoder(converted(), reference_of(), package, ORIGIN)
    assert not (package / "old").exists()
    assert (package / "Manifest.json").exists()


def converted_decoder() -> object:
    return convert_decoder(toy())


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    package = tmp_path_factory.mktemp("decoder") / "Decoder.mlpackage"
    return package, export_coreml_decoder(converted_decoder(), reference_of(), package, ORIGIN)


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("with_box", [False, True])
def test_a_decoder_takes_1_to_16_points_and_a_box(count: int, with_box: bool, decoder: tuple[Path, dict]) -> None:
    predictor = SamPredictor(toy())
    predictor.set_image(generate_scene(np.random.default_rng(2), 300)[0][:200])
    rng = np.random.default_rng(count)
    prompt = {"point_coords": rng.uniform(0, 200, (count, 2)), "point_labels": rng.integers(0, 2, count)}
    if with_box:
        prompt["box"] = np.array([20, 30, 150, 180])
    found = MilProgram(decoder[0])(decoder_feeds(predictor.features.numpy(), *points_of(predictor, prompt)))
    _, iou, low_res = predictor.predict(**prompt, multimask_output=True)
    assert relative_error(found["low_res_masks"][0, 1:], low_res) < 1e-2
    np.testing.assert_allclose(found["iou_predictions"][0, 1:], iou, atol=1e-2)


@pytest.mark.slow
def test_positions_are_computed_in_float32(decoder: tuple[Path, dict]) -> None:
    """In float16 x = 1000.3 px is 1000.5, and its angle off by a hundredth."""
    function = specification(decoder[0]).mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    types = {op.type: op.outputs[0].type.tensorType.dataType for op in operations}
    assert types["sin"] == types["cos"] == FLOAT32
    assert types["softmax"] == FLOAT16
    assert decoder[1]["parity"]["mask_miou"] >= decoder[1]["parity"]["allowed"]["mask_miou"] == 0.995


@pytest.mark.slow
def test_a_decoder_of_another_sam_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = reference_of()
    embed = PromptDecoder.embed_points
    monkeypatch.setattr(PromptDecoder, "embed_points", lambda self, coords, labels: embed(self, coords + 40, labels))
    with pytest.raises(ParityError, match=r"^Decoder\.mlpackage differs from PyTorch"):
        export_coreml_decoder(converted_decoder(), compared, tmp_path / "Decoder.mlpackage", ORIGIN)
    assert list(tmp_path.iterdir()) == []


def test_a_package_can_be_read_by_whoever_gets_it(decoder: tuple[Path, dict]) -> None:
    package = decoder[0]
    modes = {path.relative_to(package).as_posix(): path.stat().st_mode & 0o777 for path in package.rglob("*")}
    assert {mode for path, mode in modes.items() if (package / path).is_file()} == {0o644}
    assert {mode for path, mode in modes.items() if (package / path).is_dir()} == {0o755}
    data = "Data/com.apple.CoreML"
    assert set(modes) == {
        "Manifest.json", "Data", data, f"{data}/model.mlmodel", f"{data}/weights", f"{data}/weights/weight.bin"
    }  # fmt: skip


def test_every_input_has_one_size(decoder: tuple[Path, dict]) -> None:
    """The Neural Engine runs a flexible input at its default size alone."""
    for each in specification(decoder[0]).description.input:
        assert each.type.multiArrayType.WhichOneof("ShapeFlexibility") is None, each.name
        assert each.shortDescription


@pytest.mark.slow
def test_grouped_palettes_are_nearer_and_need_ios_18(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml, "COMPRESSED", Bounds(relative_error=0.5))
    newest = convert_encoder(RgbEncoder(small_student()).eval(), newest=True)
    errors = {}
    for weights, model in ((Weights(4), converted()), (Weights(4, 8), newest), (Weights(6, 8), newest)):
        package = tmp_path / "Encoder.mlpackage"
        entry = export_coreml_encoder(compress(model, weights), reference_of(), package, ORIGIN, weights)
        errors[weights] = entry["parity"]["relative_error"]
        assert entry["minimum_deployment_target"] == weights.target
        target = ct.target.iOS18 if weights.grouped else ct.target.iOS16
        assert specification(package).specificationVersion == target.value
    # Weights are nearer; what an embedding makes of that is chance where a student is as small as this one.
    assert errors[Weights(6, 8)] < errors[Weights(4, 8)] < 1.1 * errors[Weights(4)]


@pytest.mark.slow
def test_a_decoder_in_8_bits_takes_half(decoder: tuple[Path, dict], tmp_path: Path) -> None:
    package = tmp_path / "Decoder_8bit.mlpackage"
    model = compress(converted_decoder(), Weights(8))
    entry = export_coreml_decoder(model, reference_of(), package, ORIGIN, Weights(8))
    assert entry["parity"]["mask_miou"] > 0.98
    sizes = [next(each.rglob("weight.bin")).stat().st_size for each in (package, decoder[0])]
    assert sizes[0] < 0.6 * sizes[1]
