"""`huggingface/`: a student as transformers loads it from the hub, with the code that builds it and a model card."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from distill.clients import write_client
from distill.export.files import whole_directory
from distill.export.hub.card import write_card
from distill.export.hub.files import write_text_json
from distill.export.hub.modules import student_modules
from distill.export.onnx import FLOAT32
from distill.export.proof import Encode, Reference, within
from distill.export.subject import Subject, unfit
from distill.recipe import Recipe
from embeddings_cache.images import pad_pixels, to_encoder_input
from embeddings_cache.system import installed_versions
from students import (
    InputError,
    StudentEncoder,
    hugging_face_decoder,
    hugging_face_decoder_config,
    hugging_face_preprocessing,
)

MODEL, CONFIG = "modeling_sam_student.SamStudentModel", "configuration_sam_student.SamStudentConfig"

PREFIX = "vision_encoder.encoder."
"""Of the student's weights."""


def export_hugging_face(path: Path, recipe: Recipe, subject: Subject, reference: Reference) -> dict[str, Any]:
    """Write the folder: weights, configuration, code and model card.

    Args:
        path: of the folder.
        recipe: whose run directory the card's facts are from.
        subject: a student with a decoder.
        reference: what PyTorch makes of some images, for the card.

    Returns:
        What the manifest says.

    Raises:
        InputError: the encoder is none of a student's.
        ParityError: the folder's code and weights do not make what the student makes.
    """
    student, sam = subject.whole, subject.sam
    assert sam is not None
    if reason := unfit("huggingface", subject):
        raise InputError(reason)
    assert isinstance(student, StudentEncoder)
    versions = installed_versions(("sam-distill", "torch", "timm", "transformers"))
    with whole_directory(path) as folder:
        folder.mkdir()
        # Buffers that are computed too: transformers fills in the file's values and computes none.
        tensors = {PREFIX + name: t for name, t in (*student.named_parameters(), *student.named_buffers())}
        tensors |= hugging_face_decoder(sam)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        write_text_json(folder / "config.json", _config(subject, student))
        write_text_json(folder / "preprocessor_config.json", hugging_face_preprocessing(sam))
        write_client("huggingface", folder, {})
        for name, text in student_modules(versions["sam-distill"]).items():
            (folder / name).write_text(text, encoding="utf-8")
        with encoder_of(folder) as encode:
            parity = within(path.name, reference.parity(encode), FLOAT32)
        write_card(folder, recipe, subject, parity, versions)
        contents = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return {"format": "folder", "precision": "float32", "contents": contents, "parity": parity}


def _config(subject: Subject, student: StudentEncoder) -> dict[str, Any]:
    """`config.json`: SAM's numbers, the student's, and which class reads them."""
    decoder = hugging_face_decoder_config(cast(Any, subject.sam))
    prompts = decoder["prompt_encoder_config"]
    return {
        "architectures": ["SamStudentModel"],
        "auto_map": {"AutoConfig": CONFIG, "AutoModel": MODEL, "AutoModelForMaskGeneration": MODEL},
        "model_type": "sam_student",
        "dtype": "float32",
        "student": asdict(student.config),
        "vision_config": {
            "image_size": prompts["image_size"],
            "patch_size": prompts["patch_size"],
            "output_channels": prompts["hidden_size"],
            "num_pos_feats": prompts["hidden_size"] // 2,
        },
        **decoder,
    }


@contextmanager
def encoder_of(folder: Path) -> Iterator[Encode]:
    """The encoder of a folder by its own code, as something that turns a resized picture into its embedding."""
    package = ModuleType("exported_student")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        module: Any = import_module(f"{package.__name__}.encoder")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["student"]
        with torch.random.fork_rng(devices=[]):
            encoder = module.build_encoder(module.StudentConfig(**config)).eval()
        weights = load_file(folder / "model.safetensors")
        own = {name: weights[PREFIX + name] for name in encoder.state_dict()}
        encoder.load_state_dict(own)

        @torch.no_grad()
        def encode(pixels: np.ndarray) -> np.ndarray:
            image = to_encoder_input(pad_pixels(pixels, encoder.img_size)[None], torch.tensor([pixels.shape[:2]]))
            return encoder(image).numpy()

        yield encode
    finally:
        sys.dont_write_bytecode = written
        for name in [name for name in sys.modules if name.split(".")[0] == package.__name__]:
            del sys.modules[name]
