"""PyTorch → Core ML: ML Programs in float16 for iOS 16 and macOS 13 up, not saved, described or compared yet."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import nn

from distill.export.coreml.package import require_coremltools
from distill.export.decoder import PromptDecoder
from distill.export.encoder import RgbEncoder
from distill.export.quiet import quietly
from students import InputError, first_line

MAX_POINTS = 18
"""16 points, and a box as two."""


def convert_encoder(encoder: RgbEncoder) -> Any:
    """A `coremltools` model of an encoder, not saved yet.

    Raises:
        InputError: coremltools is not installed.
    """
    ct, size = require_coremltools(), encoder.image_size
    image = ct.ImageType(name="image", shape=(1, 3, size, size), color_layout=ct.colorlayout.RGB)
    return _convert(encoder, (torch.zeros(1, 3, size, size),), [image], ["image_embeddings"])


def convert_decoder(decoder: PromptDecoder, sam: Sam) -> Any:
    """A `coremltools` model of a decoder, not saved yet."""
    ct = require_coremltools()
    cells = sam.prompt_encoder.image_embedding_size[0]
    embedding = (1, sam.prompt_encoder.embed_dim, cells, cells)
    count = ct.RangeDim(lower_bound=1, upper_bound=MAX_POINTS, default=2)
    points = torch.export.Dim("points", min=1, max=MAX_POINTS)
    return _convert(
        decoder,
        (torch.zeros(embedding), torch.zeros(1, 2, 2), torch.ones(1, 2)),
        [
            ct.TensorType(name="image_embeddings", shape=embedding, dtype=np.float16),
            ct.TensorType(name="point_coords", shape=(1, count, 2), dtype=np.float32),
            ct.TensorType(name="point_labels", shape=(1, count), dtype=np.float32),
        ],
        ["low_res_masks", "iou_predictions"],
        dynamic_shapes=({}, {1: points}, {1: points}),
        precision=_without_angles(),
    )


def compress(model: Any, bits: int | None) -> Any:
    """Weights in 8 bits, linear in each channel, in 6, a palette for each tensor, or as they are; activations stay
    float16."""
    if bits is None:
        return model
    require_coremltools()
    import coremltools.optimize.coreml as optimize

    config: Any
    with _silent():
        if bits == 8:
            config = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", granularity="per_channel")
            return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(global_config=config))
        config = optimize.OpPalettizerConfig(mode="kmeans", nbits=bits)
        return optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=config))


def _convert(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: list[Any],
    outputs: list[str],
    dynamic_shapes: Any = None,
    precision: Any = None,
) -> Any:
    ct = require_coremltools()
    with _silent(), torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=dynamic_shapes).run_decompositions({})
        _without_aliases(program.graph_module)
        try:
            return ct.convert(
                program,
                inputs=inputs,
                outputs=[ct.TensorType(name=name) for name in outputs],
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS16,
                compute_precision=precision or ct.precision.FLOAT16,
                skip_model_load=True,
            )
        except NotImplementedError as error:  # an operator that coremltools does not know
            raise InputError(f"coremltools cannot convert this model: {first_line(error)}") from error


def _without_aliases(graph_module: torch.fx.GraphModule) -> None:
    """Leave out second names of values, which coremltools does not know."""
    for node in graph_module.graph.nodes:
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def _without_angles() -> Any:
    """float16 except for what a sine or cosine is made of: there it would place a point off by half a pixel."""
    known: dict[str, bool] = {}

    def leads_to_angle(op: Any) -> bool:
        if op.name not in known:
            later = (child for output in op.outputs for child in output.child_ops)
            known[op.name] = op.op_type in ("sin", "cos") or any(map(leads_to_angle, list(later)))
        return known[op.name]

    return require_coremltools().transform.FP16ComputePrecision(op_selector=lambda op: not leads_to_angle(op))


@contextmanager
def _silent() -> Iterator[None]:
    """Without coremltools' progress bars, a dozen for each package."""
    with redirect_stderr(io.StringIO()), quietly("coremltools"):
        yield
