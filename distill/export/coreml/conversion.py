"""PyTorch → Core ML: ML Programs in float16, for iOS 16 and macOS 13 up unless they are asked to need more; not saved,
described or compared yet."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import nn

from distill.export.batch import BatchDecoder
from distill.export.coreml.package import require_coremltools
from distill.export.coreml.weights import Weights
from distill.export.encoder import RgbEncoder
from distill.export.quiet import quietly
from students import InputError, first_line

MAX_POINTS = 18
"""16 points, and a box as two."""


def convert_encoder(encoder: RgbEncoder, newest: bool = False) -> Any:
    """A `coremltools` model of an encoder, not saved yet; `newest`: for iOS 18, and what only that knows.

    Raises:
        InputError: coremltools is not installed.
    """
    ct, size = require_coremltools(), encoder.image_size
    image = ct.ImageType(name="image", shape=(1, 3, size, size), color_layout=ct.colorlayout.RGB)
    return _convert(encoder, (torch.zeros(1, 3, size, size),), [image], ["image_embeddings"], newest)


def convert_decoder(sam: Sam, newest: bool = False) -> Any:
    """A `coremltools` model of a SAM's decoder of one prompt, not saved yet: of a fixed size, for the Neural Engine
    runs a flexible one at its default alone. `newest` as for `convert_encoder`."""
    ct = require_coremltools()
    cells = sam.prompt_encoder.image_embedding_size[0]
    embedding, mask = (1, sam.prompt_encoder.embed_dim, cells, cells), (1, 1, 4 * cells, 4 * cells)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "image_embeddings": (embedding, np.float16),
        "point_coords": ((1, MAX_POINTS, 2), np.float32),
        "point_labels": ((1, MAX_POINTS), np.float32),
        "mask_input": (mask, np.float16),
        "has_mask_input": ((1,), np.float16),
    }
    return _convert(
        BatchDecoder(sam).eval(),
        tuple(torch.zeros(shape) for shape, _ in shapes.values()),
        [ct.TensorType(name=name, shape=shape, dtype=dtype) for name, (shape, dtype) in shapes.items()],
        ["low_res_masks", "iou_predictions"],
        newest,
        precision=_without_angles(),
    )


def compress(model: Any, weights: Weights) -> Any:
    """A model with fewer bits for its weights; activations stay float16."""
    if weights.bits is None:
        return model
    require_coremltools()
    import coremltools.optimize.coreml as optimize

    config: Any
    with _silent():
        if weights.bits == 8:
            config = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", granularity="per_channel")
            return optimize.linear_quantize_weights(model, optimize.OptimizationConfig(global_config=config))
        grouped = {"granularity": "per_grouped_channel", "group_size": weights.group} if weights.grouped else {}
        config = optimize.OpPalettizerConfig(mode="kmeans", nbits=weights.bits, **grouped)
        return optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=config))


def _convert(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: list[Any],
    outputs: list[str],
    newest: bool,
    precision: Any = None,
) -> Any:
    ct = require_coremltools()
    with _silent(), torch.no_grad():
        program = torch.export.export(module, example).run_decompositions({})
        _without_aliases(program.graph_module)
        try:
            return ct.convert(
                program,
                inputs=inputs,
                outputs=[ct.TensorType(name=name) for name in outputs],
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS18 if newest else ct.target.iOS16,
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
