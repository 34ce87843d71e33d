"""ONNX files: how every one of them is written and run."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import helper
from torch import nn

from distill.export.onnx.opset import EXPORTED, in_opset
from distill.export.quiet import quietly

TWO_GIGABYTES = 2**31
"""What a protobuf, and so one ONNX file, may hold."""


def onnx_model(module: nn.Module, example: tuple[torch.Tensor, ...], opset: int, **options: Any) -> onnx.ModelProto:
    """A module as an ONNX model of an opset, without what the exporter says and notes; `options` as for
    `torch.onnx.export`."""
    with quietly("torch.onnx", "onnxscript", "onnx_ir"), torch.no_grad():
        program = torch.onnx.export(module, example, dynamo=True, verbose=False, opset_version=EXPORTED, **options)
    assert program is not None
    model = without_traces(program.model_proto)
    if opset_of(model) != EXPORTED:
        raise RuntimeError(f"the exporter made opset {opset_of(model)}, not {EXPORTED}")
    return in_opset(model, opset)


def opset_of(model: onnx.ModelProto) -> int:
    """The opset of a model."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Leave out where in the source each operator comes from: paths of this machine, and a third of a small file."""
    for entry in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        entry.ClearField("metadata_props")
        entry.ClearField("doc_string")
    return model


def marked(model: onnx.ModelProto, marks: dict[str, str]) -> onnx.ModelProto:
    """A model with metadata: which encoder and decoder belong together, the licence."""
    helper.set_model_props(model, marks)
    return model


def open_session(
    model: Path | bytes, provider: str = "CPUExecutionProvider", sizes: dict[str, int] | None = None, **options: Any
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session, which only reports errors.

    Args:
        model: the path of a file, or what would be in it.
        provider: what runs it; what that cannot run goes to the CPU.
        sizes: of dimensions that the file leaves open, by name.
        options: `SessionOptions`' attributes.
    """
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = torch.get_num_threads()
    for name, value in options.items():
        setattr(settings, name, value)
    for name, size in (sizes or {}).items():
        settings.add_free_dimension_override_by_name(name, size)
    return onnxruntime.InferenceSession(model, settings, providers=[provider])
