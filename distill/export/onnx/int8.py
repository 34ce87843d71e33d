"""`encoder_int8.onnx`: 8-bit weights and activations, with as many layers left in float as the masks need.

Static quantisation by ONNX Runtime (QDQ, weights for each output channel; arXiv:2004.09602, sections 3 and 4).
Weights keep to 7 bits, because the products of 8 overflow on x86 processors without VNNI: a file that is right here is
then right everywhere. What stays float computes in float32, on weights that are stored in float16, or in the last
resort in 8 bits: runtimes turn them into float32 as they load the file.
"""

import copy
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process

from distill.export.encoder import pad_with_mean_colour
from distill.export.onnx.encoder import describe_encoder, onnx_encode
from distill.export.onnx.file import open_session
from distill.export.onnx.opset import in_opset
from distill.export.onnx.small_weights import with_float16_weights, with_int8_weights
from distill.export.onnx.speed import times_as_fast
from distill.export.proof import COMPRESSED, ParityError, Reference, within
from distill.export.quiet import quietly
from distill.schema import OLDEST_OPSET
from embeddings_cache.system import TEMPORARY, iterate_ahead, whole_file

INT8 = COMPRESSED

QUANTIZED = ("Conv", "MatMul", "Gemm", "Add", "Mul", "Relu", "Sigmoid", "ReduceMean")
"""Softmax, norms and GELU stay float: they cost little, and their ranges do not fit 8 bits well."""

GROUPS = 16
"""Of neighbouring operators, which go back to float together."""

IN_FLOAT = (1, 2, 4, 8, 12)
"""Groups that stay float, tried in turn where 8 bits for all are not enough."""

WEIGHTS_ALONE = "float32, weights in int8"
"""The precision of a file of the last resort: a quarter of the bytes, and no faster."""

FRUGAL: dict[str, Any] = {
    "execution_order": onnxruntime.ExecutionOrder.PRIORITY_BASED,
    "graph_optimization_level": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
"""For calibration: each activation is measured as soon as it is there. In ONNX Runtime's usual order all are kept until
the end: 8 GB for RepViT-M2.3 at 1024 px instead of 1.5, and three times as slow."""


class Pictures(CalibrationDataReader):
    """Resized pictures, RGB uint8 (h, w, 3), as ONNX Runtime's calibration asks for them."""

    def __init__(self, pictures: list[np.ndarray], size: int) -> None:
        self.feeds: Iterator[dict[str, np.ndarray]] = ({"image": pad_with_mean_colour(p, size)} for p in pictures)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def export_int8_encoder(
    model: onnx.ModelProto,
    reference: Reference,
    path: Path,
    pictures: list[np.ndarray],
    opset: int = OLDEST_OPSET,
    gate: Reference | None = None,
) -> dict[str, Any]:
    """Write an ONNX encoder in 8 bits; where its masks differ too much from PyTorch's, layers go back to float, those
    that matter most first, until they do not. Where most of them are not enough, only weights are in 8 bits.

    Args:
        model: from `encoder_model`, of the newest opset: activations that are spelled out would be quantised in parts.
        reference: what PyTorch makes of a few images, with a decoder: what fails on these is not tried on more.
        path: of the file.
        pictures: RGB uint8 (h, w, 3) to find the ranges of activations with; not those of the reference.
        opset: of the file.
        gate: what PyTorch makes of more images, which decide; default: the reference.

    Returns:
        Inputs, outputs, parity, the names of the operators that stayed float, and how many times as fast as the float
        model it is in ONNX Runtime on this machine, for the manifest.

    Raises:
        ParityError: not even weights in 8 bits are near enough.
    """
    size = model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value
    with (
        whole_file(path) as temporary,
        TemporaryDirectory(dir=path.parent, prefix=TEMPORARY) as scratch,
        quietly("root"),
    ):
        prepared = Path(scratch) / "prepared.onnx"
        onnx.save(model, prepared)
        quant_pre_process(str(prepared), str(prepared), skip_symbolic_shape=True)
        ranges = calibrate(prepared, Pictures(pictures, size))
        operators = len(quantizable(onnx.load(prepared)))
        for attempt, in_float in attempts(prepared, ranges, pad_with_mean_colour(pictures[0], size)):
            del attempt.metadata_props[:]  # the optimizer's
            attempt.metadata_props.extend(model.metadata_props)
            onnx.save(in_opset(attempt, opset), temporary)
            try:
                for compared in filter(None, (reference, gate)):
                    parity = within(path.name, compared.parity(onnx_encode(temporary)), INT8)
                break
            except ParityError:
                if len(in_float) == operators:
                    raise
        return {
            **describe_encoder(temporary),
            "precision": "int8" if len(in_float) < operators else WEIGHTS_ALONE,
            "operators_in_float": sorted(in_float),
            "operators_in_int8": operators - len(in_float),
            "calibration_images": len(pictures),
            "times_as_fast": round(times_as_fast(temporary, model.SerializeToString()), 2),
            "parity": parity,
        }


def attempts(prepared: Path, ranges: Any, image: np.ndarray) -> Iterator[tuple[onnx.ModelProto, list[str]]]:
    """A model in 8 bits, with more and more of its operators in float, and the names of these; in the end all of them,
    with weights in 8 bits.

    Args:
        prepared: the model's file.
        ranges: from `calibrate`.
        image: float32 (1, 3, S, S), padded, to find out with what matters most.
    """
    yield quantize(onnx.load(prepared), ranges, []), []
    ranking = rank_groups(onnx.load(prepared), ranges, image)
    for count in IN_FLOAT:
        in_float = [name for group in ranking[:count] for name in group]
        if count < len(ranking):
            yield with_float16_weights(quantize(onnx.load(prepared), ranges, in_float), in_float), in_float
    model = onnx.load(prepared)
    names = quantizable(model)
    yield with_int8_weights(model, names), names


def calibrate(model: Path, pictures: Pictures) -> Any:
    """The smallest and largest value of every activation, averaged over some pictures: a rare outlier is cut off rather
    than coarsening everything else."""
    augmented = model.with_name("augmented.onnx")
    calibrator = create_calibrator(
        str(model),
        list(QUANTIZED),
        str(augmented),
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={"moving_average": True},
    )
    calibrator.infer_session = open_session(augmented, **FRUGAL)
    calibrator.collect_data(pictures)
    return calibrator.compute_data()


def quantize(model: onnx.ModelProto, ranges: Any, in_float: list[str]) -> onnx.ModelProto:
    """`model` in 8 bits, but for the operators with these names; it is changed on the way."""
    quantizer = QDQQuantizer(
        model,
        True,  # weights for each channel
        True,  # weights of 7 bits
        QuantType.QInt8,
        QuantType.QUInt8,
        copy.deepcopy(ranges),
        quantizable(model),
        in_float,
        list(QUANTIZED),
        {},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()  # what it adds stands at the end until then
    return quantizer.model.model


def quantizable(model: onnx.ModelProto) -> list[str]:
    """Names of the operators that 8 bits are for: all of their kinds, but for products of two activations, as in
    attention; ONNX Runtime's optimiser (1.31) makes something else of these and the sums behind them."""
    weights = {entry.name for entry in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in QUANTIZED and (node.op_type != "MatMul" or weights & set(node.input))
    ]


def rank_groups(model: onnx.ModelProto, ranges: Any, image: np.ndarray) -> list[list[str]]:
    """Names of the operators in groups of neighbours, first the group that changes the embedding most where it alone is
    in 8 bits: what happens within a layer says little about what becomes of it further on. What lies before a group is
    computed once, for all.

    Args:
        model: in float32.
        ranges: from `calibrate`.
        image: float32 (1, 3, S, S), padded.
    """
    names = quantizable(model)
    groups = [list(group) for group in np.array_split(names, min(GROUPS, len(names)))]
    places = {node.name: place for place, node in enumerate(model.graph.node)}
    starts = [places[group[0]] for group in groups]
    crossing = [values_into(model, start) for start in starts]
    (embedding,) = (output.name for output in model.graph.output)
    values = {"image": image, **run_for({name for names in crossing for name in names} | {embedding}, model, image)}

    def alone(place: int) -> onnx.ModelProto:
        others = [name for name in names if name not in groups[place]]
        rest = rest_of(model, starts[place], {name: values[name] for name in crossing[place]})
        return quantize(rest, ranges, others)

    effects = []
    with closing(iterate_ahead(map(alone, range(len(groups))), 1)) as models:  # the next is made while one runs
        for each in models:
            inputs = {entry.name: values[entry.name] for entry in each.graph.input}
            found = open_session(each.SerializeToString()).run([embedding], inputs)[0]
            effects.append(float(np.linalg.norm(found - values[embedding])))
    return [group for _, group in sorted(zip(effects, groups, strict=True), key=lambda pair: -pair[0])]


def values_into(model: onnx.ModelProto, start: int) -> list[str]:
    """Names of the values that the operators from place `start` on take from those before, or from outside."""
    nodes = model.graph.node[start:]
    made = {name for node in nodes for name in node.output} | {entry.name for entry in model.graph.initializer}
    return list(dict.fromkeys(name for node in nodes for name in node.input if name and name not in made))


def run_for(names: set[str], model: onnx.ModelProto, image: np.ndarray) -> dict[str, np.ndarray]:
    """Values within a model, for an image."""
    names = names - {"image"}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    there = {output.name for output in model.graph.output}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names - there))
    order = sorted(names)
    return dict(zip(order, open_session(watched.SerializeToString()).run(order, {"image": image}), strict=True))


def rest_of(model: onnx.ModelProto, start: int, inputs: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The operators from place `start` on, as a model that takes values like these."""
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    del rest.graph.node[:start], rest.graph.input[:]
    used = {name for node in rest.graph.node for name in node.input}
    for place in reversed(range(len(rest.graph.initializer))):
        if rest.graph.initializer[place].name not in used:
            del rest.graph.initializer[place]
    for name, value in inputs.items():
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        rest.graph.input.append(helper.make_tensor_value_info(name, kind, value.shape))
    return rest
