"""Programs as a whole: what their types do, what is refused, inputs, and whole models. Every package here is made by
coremltools, saved, and read back; what is expected is worked out beside it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_anything.utils.onnx import SamOnnxModel
from torch import nn

from distill.export.coreml.operations import OPERATIONS
from distill.export.coreml.program import MilProgram
from distill.export.coreml.runtime import CoremlRuntime, runtime_available
from distill.export.encoder import RgbEncoder
from embeddings_cache.teacher.loading import load_teacher
from mil import Arrays, X, channels, convert, ct, mb, operations, random, save_program, trace
from students import InputError, StudentEncoder, create_student


def test_every_kind_of_operation_has_its_tests() -> None:
    kinds = {operation.run.__module__.rpartition(".")[2] for operation in OPERATIONS.values()}
    files = (Path(__file__).parent / "operations").glob("test_*.py")
    assert {path.stem.removeprefix("test_") for path in files} == kinds


# What the types do


def test_float16_overflows_where_the_file_says_float16(tmp_path: Path) -> None:
    inputs = {"x": np.array([300, -300, 1e-5, 2049], np.float32)}
    path = save_program(tmp_path / "m.mlpackage", lambda x: mb.mul(x=x, y=x), inputs, half=True)
    (result,) = MilProgram(path)(inputs).values()
    assert result.tolist() == [math.inf, math.inf, 0, math.inf]
    (result,) = MilProgram(path, float16=False)(inputs).values()
    np.testing.assert_allclose(result, inputs["x"] ** 2)


def test_float16_rounds_after_each_operation_and_not_within_one(tmp_path: Path) -> None:
    x = np.array([2048, 0.1], np.float32)
    path = save_program(tmp_path / "m.mlpackage", lambda x: mb.sub(x=mb.add(x=x, y=1.0), y=1.0), {"x": x}, half=True)
    (result,) = MilProgram(path)({"x": x}).values()
    tenth = np.float16(np.float16(0.1) + np.float16(1)) - np.float16(1)
    assert result.tolist() == [2047, tenth]  # 2049 is no float16, and ties go to even
    ones = {"x": np.full((1, 4096), 1.001, np.float32)}
    path = save_program(tmp_path / "sum.mlpackage", lambda x: mb.reduce_sum(x=x, axes=[1]), ones, half=True)
    (result,) = MilProgram(path)(ones).values()
    assert result.tolist() == [np.float16(np.float64(np.float16(1.001)) * 4096)]


def test_a_program_in_float32_is_not_rounded(tmp_path: Path) -> None:
    path = save_program(tmp_path / "m.mlpackage", lambda x: mb.mul(x=x, y=x), {"x": X * 300})
    (result,) = MilProgram(path)({"x": X * 300}).values()
    np.testing.assert_allclose(result, (X * 300) ** 2, rtol=1e-6)


def test_values_are_dropped_after_their_last_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chain(x: Any) -> Any:
        first = x
        for _ in range(20):
            x = mb.relu(x=x)
        halves = mb.split(x=x, num_splits=2, axis=-1)
        return mb.add(x=halves[0], y=mb.reduce_sum(x=first, axes=[-1], keep_dims=True))

    program = MilProgram(save_program(tmp_path / "m.mlpackage", chain, {"x": X}))
    held, run = [], MilProgram._run

    def spy(self: MilProgram, step: Any, values: dict[int, Any]) -> None:
        run(self, step, values)
        held.append(sum(isinstance(value, torch.Tensor) and value.numel() >= X.size // 2 for value in values.values()))

    monkeypatch.setattr(MilProgram, "_run", spy)
    (result,) = program({"x": X}).values()
    np.testing.assert_allclose(result, np.maximum(X, 0)[..., :2] + X.sum(-1, keepdims=True), rtol=1e-5, atol=1e-5)
    assert max(held) == 4  # the input, what split took, and both halves


# What is refused


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda x: mb.topk(x=x, k=1)[0], "operations that are not supported: topk"),
        (lambda x: mb.local_response_norm(x=x, size=3), "not supported: local_response_norm"),
        (lambda x: mb.concat(values=[x, x], axis=1, interleave=True), "interleave=True is not supported"),
        (lambda x: mb.cumsum(x=x, axis=1, reverse=True), "reverse=True is not supported"),
        (lambda x: mb.gather(x=x, indices=[[0], [1]], axis=1, batch_dims=1), "batch_dims=1 is not supported"),
        (
            lambda x: mb.max_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid", ceil_mode=True),
            "max_pool .* ceil_mode=True is not supported",
        ),
        (
            lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=1.5, scale_factor_width=2.0),
            "scale_factor_height=1.5 is not supported",
        ),
        (
            lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2, align_corners=False, half_pixel_centers=False),
            "its input half_pixel_centers is not supported",
        ),
        (lambda x: mb.reduce_mean(x=mb.cast(x=x, dtype="int32"), axes=[1]), "reduce_mean .* of integers"),
        (lambda x: mb.pow(x=mb.cast(x=x, dtype="int32"), y=2), "pow .* of integers"),
    ],
)
def test_what_is_not_covered_is_refused_before_anything_runs(
    body: Callable[..., Any], message: str, tmp_path: Path
) -> None:
    path = save_program(tmp_path / "m.mlpackage", body, {"x": X})
    with pytest.raises(InputError, match=rf"m\.mlpackage.*{message}"):
        MilProgram(path)


def test_a_division_of_integers_that_leaves_a_rest_is_refused(tmp_path: Path) -> None:
    inputs = {"x": np.array([7], np.int32), "y": np.array([2], np.int32)}
    path = save_program(tmp_path / "m.mlpackage", lambda x, y: mb.real_div(x=x, y=y), inputs)
    with pytest.raises(InputError, match="leaves a rest"):
        MilProgram(path)(inputs)


def test_an_index_out_of_bounds_is_an_error_that_names_the_operation(tmp_path: Path) -> None:
    inputs = {"x": X, "y": np.array([3], np.int32)}
    path = save_program(tmp_path / "m.mlpackage", lambda x, y: mb.gather(x=x, indices=y, axis=1), inputs)
    with pytest.raises(RuntimeError, match=r"m\.mlpackage: gather gather_\d+: "):
        MilProgram(path)(inputs)


def test_a_path_that_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no Core ML package"):
        MilProgram(tmp_path / "gone.mlpackage")
    (tmp_path / "empty.mlpackage").mkdir()
    with pytest.raises(InputError, match=r"empty\.mlpackage cannot be read"):
        MilProgram(tmp_path / "empty.mlpackage")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input x is missing"),
        ({"x": X, "y": np.zeros(2, np.int32), "z": X}, "has no input z; its inputs: x, y"),
        ({"x": X[:1], "y": np.zeros(2, np.int32)}, r"input x has shape \(1, 3, 5, 4\), expected 2 × 3 × 5 × 4"),
        ({"x": X[0], "y": np.zeros(2, np.int32)}, "input x has shape"),
        ({"x": X, "y": np.zeros(2)}, "input y has type float64, expected integers"),
    ],
)
def test_inputs_have_to_be_those_of_the_package(inputs: Arrays, message: str, tmp_path: Path) -> None:
    example = {"x": X, "y": np.zeros(2, np.int32)}
    path = save_program(tmp_path / "m.mlpackage", lambda x, y: mb.gather(x=x, indices=y, axis=0), example)
    with pytest.raises(InputError, match=message):
        MilProgram(path)(inputs)


# Images, and shapes that are open


class Rows(nn.Module):
    """Doubles all rows but the first; (1, 3, H, W) → (1, 3, (H - 1) × W)."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return (image[:, :, 1:] * 2).flatten(2)


def save_rows(path: Path, name: str, example: tuple[int, ...], kind: Any, dynamic: Any = None) -> Path:
    exported = trace(Rows(), (torch.zeros(example),), dynamic)
    convert(path, exported, inputs=[kind], outputs=[ct.TensorType(name=name)])
    return path


def test_an_image_comes_as_rgb_from_0_to_255(tmp_path: Path) -> None:
    kind = ct.ImageType(name="image", shape=(1, 3, 6, 5), scale=0.5, bias=[1, 2, 3], color_layout=ct.colorlayout.RGB)
    program = MilProgram(save_rows(tmp_path / "m.mlpackage", "out", (1, 3, 6, 5), kind))
    pixels = random.integers(0, 256, (1, 3, 6, 5), dtype=np.uint8)
    scaled = pixels * 0.5 + channels(np.array([1, 2, 3]))
    expected = scaled[:, :, 1:].reshape(1, 3, 25) * 2
    for image in (pixels, pixels.astype(np.float32), pixels.astype(np.float64)):
        np.testing.assert_array_equal(program({"image": image})["out"], expected)
    for image in (pixels + 0.5, pixels - 256.0, pixels + 300.0, pixels * np.nan):
        with pytest.raises(InputError, match="input image is an image, whose values are whole numbers 0-255"):
            program({"image": image})
    with pytest.raises(InputError, match=r"input image has shape \(1, 3, 5, 6\), expected 1 × 3 × 6 × 5"):
        program({"image": pixels.swapaxes(2, 3)})


def test_a_float16_input_is_rounded(tmp_path: Path) -> None:
    kind = ct.TensorType(name="image", shape=(1, 3, 3, 5), dtype=np.float16)
    path = save_rows(tmp_path / "m.mlpackage", "out", (1, 3, 3, 5), kind)
    image = random.normal(size=(1, 3, 3, 5)).astype(np.float32)
    rounded = MilProgram(path)({"image": image})["out"]
    np.testing.assert_array_equal(rounded, image.astype(np.float16)[:, :, 1:].reshape(1, 3, 10) * 2)
    np.testing.assert_array_equal(
        MilProgram(path, float16=False)({"image": image})["out"], image[:, :, 1:].reshape(1, 3, 10) * 2
    )


def test_an_image_of_another_colour_order_is_refused(tmp_path: Path) -> None:
    kind = ct.ImageType(name="image", shape=(1, 3, 6, 5), color_layout=ct.colorlayout.BGR)
    path = save_rows(tmp_path / "m.mlpackage", "out", (1, 3, 6, 5), kind)
    with pytest.raises(InputError, match="input image is of type BGR image, which is not supported"):
        MilProgram(path)


def test_open_shapes_are_those_of_the_input(tmp_path: Path) -> None:
    rows = torch.export.Dim("rows", min=3, max=20)
    shape = ct.Shape((1, 3, ct.RangeDim(3, 20, default=6), 5))
    path = save_rows(
        tmp_path / "m.mlpackage", "out", (1, 3, 6, 5), ct.TensorType(name="image", shape=shape), ({2: rows},)
    )
    program = MilProgram(path)
    for height in (3, 6, 19, 20):
        image = random.normal(size=(1, 3, height, 5)).astype(np.float16).astype(np.float32)
        expected = image[:, :, 1:].reshape(1, 3, -1) * 2
        np.testing.assert_array_equal(program({"image": image})["out"], expected)
    with pytest.raises(InputError, match=r"has shape \(1, 3, 21, 5\), expected 1 × 3 × 3-20 × 5"):
        program({"image": np.zeros((1, 3, 21, 5), np.float32)})


@pytest.mark.parametrize("image", [False, True])
def test_shapes_from_a_list(image: bool, tmp_path: Path) -> None:
    rows = torch.export.Dim("rows", min=4, max=6)
    shapes = ct.EnumeratedShapes([(1, 3, 4, 5), (1, 3, 6, 5)])
    kind = (ct.ImageType if image else ct.TensorType)(name="image", shape=shapes)
    program = MilProgram(save_rows(tmp_path / "m.mlpackage", "out", (1, 3, 4, 5), kind, ({2: rows},)))
    for height in (4, 6):
        assert program({"image": np.ones((1, 3, height, 5))})["out"].shape == (1, 3, (height - 1) * 5)
    with pytest.raises(InputError, match=r"has shape \(1, 3, 5, 5\), expected 1 × 3 × 4 × 5 or 1 × 3 × 6 × 5"):
        program({"image": np.ones((1, 3, 5, 5))})


# Whole models


def small_student(name: str) -> StudentEncoder:
    """Norms as after training, for at their initial values half of the graph does nothing."""
    numbers = {"depths": [1, 1, 1, 1]} | ({"widths": [8, 16, 24, 32]} if name.startswith("repvit") else {})
    torch.manual_seed(0)
    student = create_student(name, image_size=128, embed_dim=64, **numbers)
    for layer in student.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            layer.running_mean.uniform_(-0.3, 0.3)
            layer.running_var.uniform_(0.5, 1.5)
    return student.eval()


def save_encoder(path: Path, student: StudentEncoder) -> Any:
    image = ct.ImageType(name="image", shape=(1, 3, 128, 128), color_layout=ct.colorlayout.RGB)
    exported = trace(RgbEncoder(student), (torch.zeros(1, 3, 128, 128),))
    return convert(path, exported, inputs=[image], outputs=[ct.TensorType(name="image_embeddings")])


PIXELS = random.integers(0, 256, (1, 3, 128, 128), dtype=np.uint8)


def relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("name", ["repvit_m0_9", "tiny_vit_5m"])
def test_an_encoder_computes_what_the_student_does(name: str, tmp_path: Path) -> None:
    student, path = small_student(name), tmp_path / "encoder.mlpackage"
    save_encoder(path, student)
    with torch.no_grad():
        expected = RgbEncoder(student).eval()(torch.from_numpy(PIXELS).float()).numpy()
    exact, half = (MilProgram(path, float16)({"image": PIXELS})["image_embeddings"] for float16 in (False, True))
    assert exact.shape == (1, 64, 8, 8)
    assert 0 < relative(exact, expected) < 2e-3  # the weights are float16
    assert relative(exact, expected) < relative(half, expected) < 1e-2
    np.testing.assert_array_equal(half, half.astype(np.float16))


@pytest.mark.slow
def test_compressed_weights_are_those_that_coremltools_unpacks(tmp_path: Path) -> None:
    optimize = ct.optimize.coreml
    model = save_encoder(tmp_path / "plain.mlpackage", small_student("repvit_m0_9"))
    palette = optimize.OpPalettizerConfig(mode="uniform", nbits=6, weight_threshold=0)
    linear = optimize.OpLinearQuantizerConfig(mode="linear", weight_threshold=0)
    magnitude = optimize.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=0)
    for operation, compressed in {
        "constexpr_lut_to_dense": optimize.palettize_weights(model, optimize.OptimizationConfig(palette)),
        "constexpr_affine_dequantize": optimize.linear_quantize_weights(model, optimize.OptimizationConfig(linear)),
        "constexpr_sparse_to_dense": optimize.prune_weights(model, optimize.OptimizationConfig(magnitude)),
    }.items():
        small, unpacked = tmp_path / f"{operation}.mlpackage", tmp_path / f"{operation}-unpacked.mlpackage"
        compressed.save(str(small))
        optimize.decompress_weights(compressed).save(str(unpacked))
        assert operation in operations(small)
        assert not any(name.startswith("constexpr") for name in operations(unpacked))
        for float16 in (False, True):
            result, expected, plain = (
                MilProgram(path, float16)({"image": PIXELS})["image_embeddings"]
                for path in (small, unpacked, tmp_path / "plain.mlpackage")
            )
            np.testing.assert_array_equal(result, expected)
            assert relative(result, plain) > 4e-3


class Decoder(nn.Module):
    """Points to masks, as segment-anything's own export has it, with as many points as come."""

    def __init__(self) -> None:
        super().__init__()
        self.sam = SamOnnxModel(load_teacher("toy", None, 128), return_single_mask=False)

    def forward(self, embedding: torch.Tensor, points: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoder = self.sam.model.prompt_encoder
        return self.sam.model.mask_decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=self.sam._embed_points(points, labels),
            dense_prompt_embeddings=encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, 8, 8),
        )


def test_a_decoder_with_any_number_of_points(tmp_path: Path) -> None:
    decoder, names = Decoder().eval(), ("embedding", "points", "labels")

    def example(count: int) -> tuple[torch.Tensor, ...]:
        labels = torch.arange(count)[None] % 5 - 1
        return torch.randn(1, 128, 8, 8), torch.rand(1, count, 2) * 128, labels.float()

    count = torch.export.Dim("count", min=2, max=9)
    given = ct.RangeDim(2, 9, default=3)
    shapes = [(1, 128, 8, 8), (1, given, 2), (1, given)]
    convert(
        tmp_path / "decoder.mlpackage",
        trace(decoder, example(3), ({}, {1: count}, {1: count})),
        inputs=[ct.TensorType(name=name, shape=shape) for name, shape in zip(names, shapes, strict=True)],
        outputs=[ct.TensorType(name="masks"), ct.TensorType(name="iou")],
        compute_precision=ct.precision.FLOAT32,
    )
    program = MilProgram(tmp_path / "decoder.mlpackage")
    for number in (2, 5, 9):
        values = example(number)
        result = program({name: value.numpy() for name, value in zip(names, values, strict=True)})
        with torch.no_grad():
            masks, iou = decoder(*values)
        assert relative(result["masks"], masks.numpy()) < 1e-4
        assert relative(result["iou"], iou.numpy()) < 1e-4


# The real thing


@pytest.mark.skipif(runtime_available(), reason="macOS has Core ML")
def test_core_ml_itself_is_asked_for_on_macos_only(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Core ML runs on macOS only"):
        CoremlRuntime(tmp_path / "m.mlpackage")


@pytest.mark.skipif(not runtime_available(), reason="Core ML runs on macOS only")
@pytest.mark.parametrize("name", ["repvit_m0_9", "tiny_vit_5m"])
def test_core_ml_itself_agrees(name: str, tmp_path: Path) -> None:
    path = tmp_path / "encoder.mlpackage"
    save_encoder(path, small_student(name))
    real = CoremlRuntime(path)({"image": PIXELS})["image_embeddings"]
    assert relative(MilProgram(path)({"image": PIXELS})["image_embeddings"], real) < 1e-2
