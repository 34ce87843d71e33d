"""Graphs for TensorRT: the types that they say, what they do not hold, and what ONNX Runtime makes of them."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from segment_anything.modeling import Sam

from distill.evaluate.ious import mask_iou
from distill.export.encoder import RgbEncoder
from distill.export.onnx.batch import batch_decoder_model
from distill.export.onnx.decoder import decoder_model, low_res_model
from distill.export.onnx.encoder import encoder_model
from distill.export.onnx.tensorrt import (
    IN_FLOAT32,
    TURNS,
    export_trt_decoder,
    export_trt_encoder,
    for_tensorrt,
    refused_by_tensorrt,
)
from distill.export.proof import ParityError
from exports import onnx_of, reference_of, small_student, toy


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    return {v.name: v.type.tensor_type.elem_type for v in values} | {w.name: w.data_type for w in inferred.initializer}


@pytest.mark.parametrize("name", ["repvit_m0_9", "tiny_vit_5m"])
def test_encoders_keep_norms_in_float32_and_the_rest_in_float16(name: str, tmp_path: Path) -> None:
    path = tmp_path / "encoder_trt.onnx"
    entry = export_trt_encoder(onnx_of(name, opset=17), reference_of(name), path)
    assert entry["parity"]["relative_error"] < 5e-3
    assert entry["parity"]["mask_miou"] > 0.995
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    types = types_of(model)
    used = {kind: {types[n.input[0]] for n in model.graph.node if n.op_type == kind} for kind in ("Conv", *IN_FLOAT32)}
    assert used["Conv"] == {TensorProto.FLOAT16}
    assert used["LayerNormalization"] == {TensorProto.FLOAT}
    assert all(found <= {TensorProto.FLOAT} for kind, found in used.items() if kind != "Conv")
    assert {types[value.name] for value in (*model.graph.input, *model.graph.output)} == {TensorProto.FLOAT}


def test_decoders_keep_the_places_of_points_in_float32(tmp_path: Path) -> None:
    path = tmp_path / "decoder_trt.onnx"
    export_trt_decoder(batch_decoder_model(toy()), reference_of(), path)
    model = onnx.load(path)
    types = types_of(model)
    assert {types[node.input[0]] for node in model.graph.node if node.op_type in TURNS} == {TensorProto.FLOAT}
    (matrix,) = [w for w in model.graph.initializer if numpy_helper.to_array(w).shape == gaussians(toy()).shape]
    assert matrix.data_type == TensorProto.FLOAT


def gaussians(sam: Sam) -> torch.Tensor:
    return sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix


def test_what_tensorrt_refuses_is_named() -> None:
    model = onnx_of(opset=17)
    assert refused_by_tensorrt(model) is None
    assert refused_by_tensorrt(batch_decoder_model(toy())) is None
    whole = decoder_model(low_res_model(toy(), single=True))
    assert refused_by_tensorrt(whole) is not None  # a mask of the picture's size, which is a value

    with_double = onnx.ModelProto.FromString(model.SerializeToString())
    with_double.graph.initializer.append(numpy_helper.from_array(np.zeros(1), "double"))
    assert refused_by_tensorrt(with_double) == "float64"
    branching = onnx.ModelProto.FromString(model.SerializeToString())
    branching.graph.node.append(helper.make_node("NonZero", ["image"], ["places"]))
    assert refused_by_tensorrt(branching) == "NonZero"
    with pytest.raises(ParityError, match=r"encoder_trt.onnx holds what TensorRT does not take: .*NonZero"):
        for_tensorrt(branching, "encoder_trt.onnx")


def test_a_size_that_depends_on_values_is_refused() -> None:
    values = [helper.make_tensor_value_info("size", TensorProto.INT64, [1])]
    out = helper.make_tensor_value_info("filled", TensorProto.FLOAT, ["n"])
    fill = numpy_helper.from_array(np.zeros(1, np.float32))
    node = helper.make_node("ConstantOfShape", ["size"], ["filled"], value=fill)
    graph = helper.make_graph([node], "fill", values, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert refused_by_tensorrt(model) == "the size of filled"


def test_batches_stay_open(tmp_path: Path) -> None:
    student = small_student()
    model = encoder_model(RgbEncoder(student).eval(), dynamic_batch=True)
    entry = export_trt_encoder(model, reference_of(), tmp_path / "encoder_trt.onnx")
    assert entry["inputs"]["image"]["shape"][0] == "N"
    assert refused_by_tensorrt(onnx.load(tmp_path / "encoder_trt.onnx")) is None


def test_masks_of_1024_px_hold_in_float16(tmp_path: Path) -> None:
    """The places of points as float16 has them lie up to half a pixel off."""
    sam = toy(1024)
    model = batch_decoder_model(sam)
    halves = for_tensorrt(model, "decoder_trt.onnx").SerializeToString()
    sessions = [InferenceSession(m, providers=["CPUExecutionProvider"]) for m in (model.SerializeToString(), halves)]
    rng = np.random.default_rng(0)
    feeds = {
        "image_embeddings": rng.standard_normal((1, 128, 64, 64), np.float32),
        "point_coords": np.concatenate([rng.uniform(700, 1023, (4, 1, 2)), np.zeros((4, 1, 2))], 1).astype(np.float32),
        "point_labels": np.tile(np.float32([1, -1]), (4, 1)),
        "mask_input": np.zeros((4, 1, 256, 256), np.float32),
        "has_mask_input": np.zeros(4, np.float32),
    }
    whole, half = (session.run(["low_res_masks"], feeds)[0] for session in sessions)
    ious = [
        mask_iou(a > 0, b > 0) for a, b in zip(whole.reshape(-1, 256, 256), half.reshape(-1, 256, 256), strict=True)
    ]
    assert min(ious) > 0.97, ious
