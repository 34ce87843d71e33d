"""How each file of an export is made: from what it is, and what several are made of once."""

import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from distill.clients import write_client
from distill.export.coreml import (
    PACKAGES,
    Conversions,
    Origin,
    export_coreml_decoder,
    export_coreml_encoder,
)
from distill.export.encoder import RgbEncoder, calibration_pictures, validation_rows
from distill.export.files import whole_directory
from distill.export.hub import export_hugging_face, export_transformers_js
from distill.export.onnx import (
    batch_decoder_model,
    decoder_model,
    encoder_model,
    export_batch_decoder,
    export_int8_encoder,
    export_onnx_decoder,
    export_onnx_encoder,
    export_picture_encoder,
    export_trt_decoder,
    export_trt_encoder,
    in_opset,
    low_res_model,
    marked,
    picture_encoder_model,
)
from distill.export.proof import Reference
from distill.export.subject import Subject, refusal
from distill.export.web import DECODER as PAGE_DECODER
from distill.export.web import ENCODERS, complete_page
from distill.recipe import Recipe
from distill.schema import NEWEST_OPSET, OLDEST_OPSET
from embeddings_cache.images import resize_longest_side
from embeddings_cache.system import TEMPORARY
from students import InputError

Make = Callable[[Path], dict[str, Any]]
"""Writes and proves a file; returns what the manifest says of it."""

Facts = dict[str, str | int]
Complete = Callable[[Path, Facts], None]
"""Puts into a tool's folder what is not a text."""


def makers(recipe: Recipe, subject: Subject, coreml: Conversions, reference: Reference) -> dict[str, Make]:
    """The function that makes each file; what several are made of is made once."""
    encoder, size, opset = RgbEncoder(subject.encoder).eval(), subject.image_size, recipe.export.opset
    origin = Origin(subject.name, subject.teacher, subject.recipe, subject.license)
    exported = cache(lambda: marked(encoder_model(encoder, recipe.export.dynamic_batch, NEWEST_OPSET), subject.marks))
    onnx = cache(lambda version: in_opset(deepcopy(exported()), version))
    low_res = cache(lambda single: marked(low_res_model(subject.sam, single, opset), subject.marks))

    @cache
    def gate() -> Reference:
        """What files of few bits are compared on: as many masks as it takes to know their worst twentieth."""
        images = max(recipe.export.gate_images, recipe.export.images)
        return Reference(subject.encoder, subject.sam, *validation_rows(recipe, size, images))

    def package(path: Path, name: str) -> dict[str, Any]:
        write = export_coreml_encoder if name.startswith("Encoder") else export_coreml_decoder
        weights = PACKAGES[name]
        return write(coreml.model(name), gate() if weights.bits else reference, path, origin, weights)

    def onnx_decoder(path: Path, single: bool = True, crop: bool = False) -> dict[str, Any]:
        return export_onnx_decoder(decoder_model(low_res(single), crop), reference, path)

    def picture_encoder(path: Path, uint8: bool) -> dict[str, Any]:
        return export_picture_encoder(picture_encoder_model(onnx(opset), uint8), reference, path)

    def pictures() -> list[np.ndarray]:
        return [resize_longest_side(each, encoder.image_size) for each in calibration_pictures(recipe, size)]

    def int8(path: Path) -> dict[str, Any]:
        return export_int8_encoder(exported(), reference, path, pictures(), opset, gate())

    def transformers_js(path: Path) -> dict[str, Any]:
        def of_batches() -> ModelProto:
            if recipe.export.dynamic_batch:
                return exported()
            return marked(encoder_model(encoder, True, NEWEST_OPSET), subject.marks)

        return export_transformers_js(path, subject, reference, cache(of_batches), pictures(), opset, gate)

    def client(path: Path, functions: dict[str, Make], complete: Complete | None = None) -> dict[str, Any]:
        """A tool's folder: files that are proven as any, and what the tool wants beside them."""
        if reason := refusal(path.name, size, subject.channels):
            raise InputError(reason)
        with whole_directory(path) as folder:
            folder.mkdir()
            described = {name: make(folder / name) for name, make in functions.items()}
            facts: Facts = {"name": slug(subject.name), "title": subject.name, "fingerprint": subject.fingerprint or ""}
            facts["size"] = size
            write_client(path.name, folder, facts)
            if complete is not None:
                complete(folder, facts)
            contents = sorted(file.name for file in folder.iterdir())
        parity = next(iter(described.values()))["parity"]
        return {
            "format": "folder",
            "precision": "float32",
            "contents": contents,
            "files": described,
            "parity": parity,
        }

    encoder_file = Once(lambda path: export_onnx_encoder(onnx(opset), reference, path))
    decoder_file = Once(onnx_decoder)
    cropped = partial(onnx_decoder, crop=True)
    batch = cache(lambda version: marked(batch_decoder_model(subject.sam, version), subject.marks))
    fp16_file = Once(lambda path: export_onnx_encoder(onnx(opset), reference, path, float16=True))
    batch_file = Once(lambda path: export_batch_decoder(batch(opset), reference, path))
    page: dict[str, Make] = {
        ENCODERS["float32"]: encoder_file,
        ENCODERS["float16"]: fp16_file,
        PAGE_DECODER: batch_file,
    }
    complete_web = partial(complete_page, input_size=encoder.image_size, settings=recipe.predict, say=print)
    pictured = {f"encoder_hwc{end}.onnx": partial(picture_encoder, uint8=bool(end)) for end in ("", "_uint8")}
    return {
        "encoder.onnx": encoder_file,
        "encoder_fp16.onnx": fp16_file,
        "encoder_int8.onnx": int8,
        "decoder.onnx": decoder_file,
        "decoder_multimask.onnx": partial(onnx_decoder, single=False),
        "decoder_batch.onnx": batch_file,
        "encoder_trt.onnx": lambda path: export_trt_encoder(onnx(OLDEST_OPSET), reference, path),
        "decoder_trt.onnx": lambda path: export_trt_decoder(batch(OLDEST_OPSET), reference, path),
        "cvat": partial(client, functions={"encoder.onnx": encoder_file, "decoder.onnx": cropped}),
        "anylabeling": partial(client, functions={**pictured, "decoder.onnx": decoder_file}),
        "label_studio": partial(client, functions={"encoder.onnx": encoder_file, "decoder.onnx": decoder_file}),
        "web": partial(client, functions=page, complete=complete_web),
        "transformers_js": transformers_js,
        "huggingface": lambda path: export_hugging_face(path, recipe, subject, reference),
        **{name: partial(package, name=name) for name in PACKAGES},
    }


class Once:
    """Makes and proves a file once, and copies it where else it is wanted."""

    def __init__(self, make: Make) -> None:
        self.make = make
        self.made: tuple[Path, dict[str, Any]] | None = None

    def __call__(self, path: Path) -> dict[str, Any]:
        if self.made is None or not self.made[0].exists():
            described = self.make(path)
            folder = path.parent.with_name(path.parent.name.removeprefix(TEMPORARY))  # which it is called in the end
            self.made = folder / path.name, described
        else:
            shutil.copyfile(self.made[0], path)
        return self.made[1]


def slug(name: str) -> str:
    """A name for files, functions and models of other programs: small letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
