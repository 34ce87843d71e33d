from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

from distill.export.encoder import RgbEncoder, pad_with_mean_colour
from distill.export.onnx import int8
from distill.export.onnx.encoder import encoder_model, export_onnx_encoder
from distill.export.onnx.file import open_session
from distill.export.onnx.int8 import export_int8_encoder
from distill.export.onnx.small_weights import with_float16_weights, with_int8_weights
from distill.export.proof import Bounds, ParityError, Reference
from distill.schema import NEWEST_OPSET
from exports import onnx_of, reference_of, scene_row, small_student

Model = tuple[onnx.ModelProto, Reference]


@pytest.fixture(scope="module")
def repvit() -> Model:
    return onnx_of(), reference_of()


@pytest.fixture(scope="module")
def tiny_vit() -> Model:
    return onnx_of("tiny_vit_5m"), reference_of("tiny_vit_5m")


def pictures(count: int = 4) -> list[np.ndarray]:
    return [scene_row(100 + seed).pixels() for seed in range(count)]


def in_8_bits(path: Path) -> int:
    """Operators with weights in 8 bits: convolutions and products whose weight goes through a DequantizeLinear."""
    onnx.checker.check_model(onnx.load(path), full_check=True)
    nodes = onnx.load(path).graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    return sum(
        node.op_type in ("Conv", "MatMul", "Gemm") and made_by.get(node.input[1]) == "DequantizeLinear"
        for node in nodes
    )


def test_weights_and_activations_are_in_8_bits(repvit: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert int8.INT8.mask_miou == 0.98
    monkeypatch.setattr(int8, "INT8", Bounds())  # the masks of weights that are drawn hang on a hair
    model, compared = repvit
    whole, path = tmp_path / "encoder.onnx", tmp_path / "encoder_int8.onnx"
    export_onnx_encoder(model, compared, whole)
    described = export_int8_encoder(model, compared, path, pictures())
    assert described["operators_in_float"] == []
    assert 1e-3 < described["parity"]["relative_error"] < 0.1
    convolutions = sum(node.op_type == "Conv" for node in onnx.load(whole).graph.node)
    assert in_8_bits(path) == convolutions
    assert path.stat().st_size < 0.45 * whole.stat().st_size  # names and scales weigh in a model as small as this
    assert {entry.type for entry in open_session(path).get_inputs()} == {"tensor(float)"}


@pytest.mark.slow
def test_operators_go_back_to_float_until_the_masks_are_right(
    repvit: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, compared = repvit
    monkeypatch.setattr(int8, "INT8", Bounds())
    plain = export_int8_encoder(model, compared, tmp_path / "plain.onnx", pictures())
    monkeypatch.setattr(int8, "INT8", Bounds(relative_error=0.7 * plain["parity"]["relative_error"]))
    described = export_int8_encoder(model, compared, tmp_path / "encoder_int8.onnx", pictures())
    names = {node.name for node in model.graph.node}
    assert described["operators_in_float"]
    assert set(described["operators_in_float"]) <= names
    path = tmp_path / "encoder_int8.onnx"
    assert in_8_bits(path) < in_8_bits(tmp_path / "plain.onnx")
    graph = onnx.load(path).graph
    kinds = {weight.name: weight.data_type for weight in graph.initializer}
    casts = [node for node in graph.node if node.op_type == "Cast"]
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(casts) == len(convolutions) - in_8_bits(path)
    assert {kinds[node.input[0]] for node in casts} == {onnx.TensorProto.FLOAT16}
    assert described["parity"]["relative_error"] <= 0.7 * plain["parity"]["relative_error"]


def test_one_that_cannot_be_right_is_not_kept(repvit: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "INT8", Bounds(relative_error=1e-9))
    with pytest.raises(ParityError, match=r"^encoder_int8\.onnx differs from PyTorch: relative error"):
        export_int8_encoder(*repvit, tmp_path / "encoder_int8.onnx", pictures())
    assert list(tmp_path.iterdir()) == []


def test_layers_that_matter_most_go_back_first(repvit: Model, tmp_path: Path) -> None:
    """An activation whose range is a thousand times too wide is lost in 8 bits."""
    model = tmp_path / "float.onnx"
    onnx.save(repvit[0], model)
    ranges = int8.calibrate(model, int8.Pictures(pictures(), 128))
    convolutions = [node for node in repvit[0].graph.node if node.op_type == "Conv"]
    for spoilt in (convolutions[0], convolutions[-1]):
        data = dict(ranges.data)
        bound = np.float32(1000 * data[spoilt.output[0]].range_value[1])
        data[spoilt.output[0]] = TensorData(lowest=-bound, highest=bound)
        widened = TensorsData(CalibrationMethod.MinMax, data)
        ranking = int8.rank_groups(repvit[0], widened, pad_with_mean_colour(pictures(1)[0], 128))
        assert spoilt.name in ranking[0]
        assert sorted(name for group in ranking for name in group) == sorted(int8.quantizable(repvit[0]))


@pytest.mark.parametrize("kind", ["repvit", "tiny_vit"])
def test_weights_in_8_bits_take_a_quarter_of_the_space_and_no_time(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: onnx.ModelProto = request.getfixturevalue(kind)[0]
    small = onnx.ModelProto()
    small.CopyFrom(model)
    products = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    with_int8_weights(small, [node.name for node in products])
    onnx.checker.check_model(small, full_check=True)
    before, after = (
        {entry.name: numpy_helper.to_array(entry) for entry in each.graph.initializer} for each in (model, small)
    )
    weights = {node.input[1] for node in products} & set(before)
    assert len(weights) > 20
    for name in weights:
        levels, scale = after[f"{name}_int8"], after[f"{name}_scale"]
        assert levels.dtype == np.int8
        assert (np.abs(levels * scale - before[name]) <= 0.501 * scale).all()
        assert scale.size in (before[name].shape[0], before[name].shape[-1])
    floats = sum(before[name].nbytes for name in weights)
    assert sum(after[f"{name}_int8"].nbytes for name in weights) == floats / 4
    assert small.ByteSize() < 0.5 * model.ByteSize()  # names and scales weigh in a model as small as this

    path = tmp_path / "optimised.onnx"
    session = open_session(small.SerializeToString(), optimized_model_filepath=str(path))
    nodes = onnx.load(path).graph.node
    assert not [node for node in nodes if node.op_type == "Cast"]
    image = {"image": pad_with_mean_colour(pictures(1)[0], 128)}
    expected, found = (each.run(None, image)[0] for each in (open_session(model.SerializeToString()), session))
    assert 1e-4 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.03


def test_in_the_last_resort_only_weights_are_in_8_bits(
    repvit: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "IN_FLOAT", ())
    monkeypatch.setattr(int8, "INT8", Bounds())
    plain = export_int8_encoder(*repvit, tmp_path / "encoder_int8.onnx", pictures())
    monkeypatch.setattr(int8, "INT8", Bounds(relative_error=0.5 * plain["parity"]["relative_error"]))
    described = export_int8_encoder(*repvit, tmp_path / "encoder_int8.onnx", pictures())
    assert described["precision"] == "float32, weights in int8"
    assert described["operators_in_int8"] == 0
    assert in_8_bits(tmp_path / "encoder_int8.onnx") == 0
    assert described["parity"]["relative_error"] <= 0.5 * plain["parity"]["relative_error"]


def test_weights_in_float16_take_half_the_space_and_no_time(repvit: Model, tmp_path: Path) -> None:
    whole, plain = onnx.ModelProto(), repvit[0]
    whole.CopyFrom(plain)
    convolutions = [node for node in plain.graph.node if node.op_type == "Conv"]
    beyond = next(weight for weight in whole.graph.initializer if weight.name == convolutions[0].input[1])
    beyond.CopyFrom(numpy_helper.from_array(1e6 * numpy_helper.to_array(beyond), beyond.name))
    halved = onnx.ModelProto()
    halved.CopyFrom(whole)
    with_float16_weights(halved, [node.name for node in convolutions])
    onnx.checker.check_model(halved, full_check=True)
    assert [node.op_type for node in halved.graph.node].count("Cast") == len(convolutions) - 1
    assert halved.ByteSize() < 0.65 * whole.ByteSize()

    path = tmp_path / "optimised.onnx"
    session = open_session(halved.SerializeToString(), optimized_model_filepath=str(path))
    assert not [node for node in onnx.load(path).graph.node if node.op_type == "Cast"]
    image = {"image": pad_with_mean_colour(pictures(1)[0], 128)}
    expected, found = (each.run(None, image)[0] for each in (open_session(whole.SerializeToString()), session))
    assert 0 < np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)


@pytest.mark.slow
def test_a_dynamic_batch_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "INT8", Bounds())
    path = tmp_path / "encoder_int8.onnx"
    model = encoder_model(RgbEncoder(small_student()).eval(), dynamic_batch=True, opset=NEWEST_OPSET)
    export_int8_encoder(model, reference_of(), path, pictures())
    images = np.concatenate([pad_with_mean_colour(picture, 128) for picture in pictures(3)])
    singly = np.concatenate([open_session(path).run(None, {"image": image[None]})[0] for image in images])
    np.testing.assert_allclose(open_session(path).run(None, {"image": images})[0], singly, atol=1e-5)


@pytest.mark.slow
def test_what_the_optimiser_makes_of_attention_is_what_the_file_says(
    tiny_vit: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime 1.31 fuses products of quantised activations into something else: relative error 1.4."""
    monkeypatch.setattr(int8, "INT8", Bounds())
    path = tmp_path / "encoder_int8.onnx"
    export_int8_encoder(*tiny_vit, path, pictures())
    image = {"image": pad_with_mean_colour(pictures(1)[0], 128)}
    levels = onnxruntime.GraphOptimizationLevel
    plain, optimised = (
        open_session(path, graph_optimization_level=level).run(None, image)[0]
        for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL)
    )
    assert np.linalg.norm(optimised - plain) < 0.1 * np.linalg.norm(plain)
