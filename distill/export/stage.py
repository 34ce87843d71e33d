"""Export: every format that the recipe names, and the manifest that describes the files."""

from pathlib import Path

import torch
from accelerate import Accelerator

from distill.export.encoder import parity_pictures
from distill.export.onnx import export_onnx_encoder
from distill.recipe import Recipe
from distill.run import chosen_student, is_current
from embeddings_cache.files import sha256, write_json
from students import load_student


def export(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Write `export/` for the chosen student: the files and `manifest.json`; returns False where they were there.

    Raises:
        InputError: no student, or an export that does not reproduce it.
    """
    directory = Path(recipe.run_dir) / "export"
    manifest = directory / "manifest.json"
    inputs = {"student_sha256": sha256(chosen_student(recipe)), "export": vars(recipe.export)}
    if is_current(manifest, inputs, accelerator):
        return False
    if accelerator.is_main_process:
        student = load_student(chosen_student(recipe))
        pictures = parity_pictures(recipe, student.img_size)
        files = {}
        if "onnx" in recipe.export.formats:
            path = directory / "encoder.onnx"
            described = export_onnx_encoder(student, path, pictures)
            files[path.name] = {"sha256": sha256(path), "bytes": path.stat().st_size, **described}
        config = student.config
        write_json(
            manifest,
            {
                "student": {"name": config.name, "image_size": config.image_size, "embed_dim": config.embed_dim},
                "teacher": recipe.teacher.name,
                "recipe": recipe.name,
                "torch": torch.__version__,
                "files": files,
                "made_from": inputs,
            },
        )
        accelerator.print(f"export: {', '.join(files)} in {directory}")
    accelerator.wait_for_everyone()
    return True
