"""`Encoder.mlpackage` and `Decoder.mlpackage` for Apple's devices, each executed and compared before it is kept.

ML Programs in float16 for iOS 16 and macOS 13 up. The encoder takes an image, so that an app passes a pixel buffer.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch import nn

from distill.evaluate.masks import mask_iou
from distill.export.coreml_check import CoremlRuntime, MilProgram, require_coremltools, runtime_available
from distill.export.decoder import MASKS, VALUES, PromptDecoder
from distill.export.encoder import RgbEncoder
from distill.export.files import whole_directory
from distill.export.onnx_file import quietly
from distill.export.prompts import DECODER_IMAGES, difference, place_embedding, points_of, predicted, prompts_of
from distill.export.proof import FLOAT16, Bounds, Encode, Reference, within
from embeddings_cache.format import installed_versions
from embeddings_cache.preprocess import PIXEL_MEAN
from students import InputError, first_line

PADDING_COLOUR = tuple(round(channel) for channel in PIXEL_MEAN)
"""The mean colour in 8 bits; what is lost by rounding it is part of every figure here."""

COMPRESSED = Bounds(relative_error=0.15, mask_miou=0.98)
"""Of 8-bit and 6-bit weights. The masks decide; an embedding further off than that is another one."""

DECODER = Bounds(relative_error=1e-2, mask_miou=0.995, iou_difference=1e-2)

MAX_POINTS = 18
"""16 points, and a box as two."""


Program = MilProgram | CoremlRuntime


@dataclass(frozen=True)
class Origin:
    """What a package says of itself."""

    student: str
    teacher: str
    recipe: str | None
    """None for a checkpoint from elsewhere, whose licence is its publisher's."""

    def describe(self) -> str:
        """The student in words."""
        return f"{self.student}, {'converted' if self.recipe is None else f'distilled from {self.teacher}'}"

    def write_to(self, model: Any, description: str) -> None:
        """Describe a Core ML model; the licence of our own students is that of SAM and of this project."""
        model.short_description = description
        model.version = f"sam-distill {installed_versions(['sam-distill'])['sam-distill']}"
        model.user_defined_metadata.update(student=self.student, teacher=self.teacher)
        if self.recipe is None:
            model.license = "that of the checkpoint it was converted from"
            return
        model.author = "sam-distill"
        model.license = "Apache-2.0"
        model.user_defined_metadata.update(recipe=self.recipe)


def export_coreml_encoder(
    model: Any, reference: Reference, path: Path, origin: Origin, bits: int | None = None
) -> dict[str, Any]:
    """Write a Core ML encoder; nothing is left at `path` unless it agrees with PyTorch.

    Args:
        model: from `convert_encoder` and `compress`.
        reference: what PyTorch makes of some images.
        path: of the package, a directory.
        origin: for its metadata.
        bits: of its weights where they are compressed.

    Returns:
        Inputs, outputs and parity, for the manifest.

    Raises:
        ParityError: the package does not reproduce the encoder.
    """
    size = reference.image_size
    origin.write_to(model, f"Segment Anything image encoder: {origin.describe()}")
    model.input_description["image"] = (
        f"RGB, longest side resized to {size}, at the top left; the rest filled with {PADDING_COLOUR}"
    )
    model.output_description["image_embeddings"] = "embedding for Segment Anything's prompt encoder and mask decoder"
    with whole_directory(path) as temporary:
        model.save(str(temporary))
        parity = reference.parity(coreml_encode(MilProgram(temporary), size))
        if bits is None:
            exact = coreml_encode(MilProgram(temporary, float16=False), size)
            parity["relative_error_in_float32"] = reference.relative_error(exact)
        if runtime_available():
            parity["runtime"] = reference.parity(coreml_encode(CoremlRuntime(temporary), size))
            within(path.name, parity["runtime"], COMPRESSED if bits else FLOAT16)
        parity = within(path.name, parity, COMPRESSED if bits else FLOAT16)
    cells = size // 16
    return {
        "format": "coreml",
        "precision": f"float16, weights in {bits} bits" if bits else "float16",
        "minimum_deployment_target": "iOS 16, macOS 13",
        "inputs": {
            "image": {
                "shape": [1, 3, size, size],
                "dtype": "image, RGB",
                "range": [0, 255],
                "values": "RGB; longest side resized to S, padded right and bottom with padding_colour",
                "padding_colour": list(PADDING_COLOUR),
            }
        },
        "outputs": {"image_embeddings": {"shape": [1, reference.channels, cells, cells], "dtype": "float16"}},
        "parity": parity,
    }


def export_coreml_decoder(model: Any, reference: Reference, path: Path, origin: Origin) -> dict[str, Any]:
    """Write a Core ML decoder: 1 to 16 points and a box → four low-resolution masks and their predicted IoUs.

    Args, returns, raises: as `export_coreml_encoder`, the model from `convert_decoder`.
    """
    sam = reference.decoder
    assert sam is not None
    origin.write_to(model, f"Segment Anything prompt encoder and mask decoder of {origin.teacher}")
    described = {"image_embeddings": "what Encoder.mlpackage makes", **VALUES}
    for name in ("image_embeddings", "point_coords", "point_labels"):
        model.input_description[name] = described[name]
    for name in ("low_res_masks", "iou_predictions"):
        model.output_description[name] = described[name]
    with whole_directory(path) as temporary:
        model.save(str(temporary))
        parity = within(path.name, decoder_parity(MilProgram(temporary), reference), DECODER)
        if runtime_available():
            parity["runtime"] = decoder_parity(CoremlRuntime(temporary), reference)
            within(path.name, parity["runtime"], DECODER)
    channels, cells = sam.prompt_encoder.embed_dim, sam.prompt_encoder.image_embedding_size[0]
    shapes: dict[str, tuple[list[Any], str]] = {
        "image_embeddings": ([1, channels, cells, cells], "float16"),
        "point_coords": ([1, f"1 to {MAX_POINTS}", 2], "float32"),
        "point_labels": ([1, f"1 to {MAX_POINTS}"], "float32"),
        "low_res_masks": ([1, MASKS, 4 * cells, 4 * cells], "float16"),
        "iou_predictions": ([1, MASKS], "float16"),
    }
    entries = {
        name: {"shape": shape, "dtype": dtype, "values": described[name]} for name, (shape, dtype) in shapes.items()
    }
    return {
        "format": "coreml",
        "precision": "float16, positions of points in float32",
        "minimum_deployment_target": "iOS 16, macOS 13",
        "inputs": {name: entries[name] for name in ("image_embeddings", "point_coords", "point_labels")},
        "outputs": {name: entries[name] for name in ("low_res_masks", "iou_predictions")},
        "parity": parity,
    }


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


def coreml_encode(program: Program, size: int) -> Encode:
    """A package that runs, as something that turns a resized picture into its embedding."""
    return lambda pixels: program({"image": pad_with_rounded_mean(pixels, size)})["image_embeddings"]


def pad_with_rounded_mean(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resized RGB uint8 (h, w, 3) → uint8 (1, 3, size, size), the pixel buffer that an app makes."""
    padded = np.empty((1, 3, size, size), dtype=np.uint8)
    padded[:] = np.array(PADDING_COLOUR, dtype=np.uint8)[:, None, None]
    padded[0, :, : pixels.shape[0], : pixels.shape[1]] = pixels.transpose(2, 0, 1)
    return padded


def decoder_parity(decode: Program, reference: Reference) -> dict[str, Any]:
    """A decoder against `SamPredictor`: the largest relative error of low-resolution logits, and the mean IoU
    of the masks that these become at the image's size."""
    assert reference.decoder is not None
    predictor = SamPredictor(reference.decoder)
    errors, differences, ious = [], [], []
    pairs = list(zip(reference.rows, reference.embeddings, strict=True))[:DECODER_IMAGES]
    for row, embedding in pairs:
        place_embedding(predictor, embedding, row)
        for prompt in prompts_of(row):
            coords, labels = points_of(predictor, prompt)
            made = decode(
                {"image_embeddings": embedding.astype(np.float16), "point_coords": coords, "point_labels": labels}
            )
            logits, predicted_ious, low_res = predicted(predictor, prompt, single=False)
            differences.append(difference(made["iou_predictions"], predicted_ious, "predicted IoUs"))
            apart = made["low_res_masks"] - low_res
            errors.append(np.linalg.norm(apart) / np.linalg.norm(low_res))
            low = torch.from_numpy(made["low_res_masks"])
            upscaled = reference.decoder.postprocess_masks(low, row.input_size, row.original_size)
            masks = zip(upscaled[0].numpy() > 0, logits[0] > 0, strict=True)
            ious += [mask_iou(*pair) for pair in masks]
    return {
        "images": len(pairs),
        "images_from": reference.images_from,
        "relative_error": float(np.max(errors)),
        "iou_difference": float(np.max(differences)),
        "masks": len(ious),
        "mask_miou": float(np.mean(ious)),
    }


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
