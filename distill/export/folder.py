"""Export: every format that the recipe names, each proven before it is kept, and the manifest that describes them."""

import re
import shutil
import time
import traceback
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from distill.clients import write_client
from distill.export.coreml import (
    BITS,
    DECODER,
    Conversions,
    Origin,
    conversions,
    export_coreml_decoder,
    export_coreml_encoder,
)
from distill.export.encoder import RgbEncoder, calibration_pictures, validation_rows
from distill.export.files import digest, remove, size, whole_directory
from distill.export.handover import write_readme
from distill.export.onnx import (
    WEIGHTS_ALONE,
    decoder_model,
    encoder_model,
    export_int8_encoder,
    export_onnx_decoder,
    export_onnx_encoder,
    export_picture_encoder,
    in_opset,
    low_res_model,
    marked,
    picture_encoder_model,
)
from distill.export.proof import ParityError, Reference
from distill.export.subject import Subject, is_untrained, load_subject, refusal, wanted_formats
from distill.recipe import Recipe
from distill.run import as_stored, chosen_student, is_current, is_whole
from distill.schema import FORMATS, NEWEST_OPSET
from embeddings_cache.images import resize_longest_side
from embeddings_cache.shards import read_info
from embeddings_cache.system import TEMPORARY, installed_versions, read_json, sha256, write_json
from students import InputError, first_line, weight_files

TOOLS = (
    "sam-distill", "torch", "timm", "segment-anything-py", "onnx", "onnxscript", "onnxruntime", "coremltools", "numpy",
)  # fmt: skip

Make = Callable[[Path], dict[str, Any]]
"""Writes and proves a file; returns what the manifest says of it."""


def export(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Write `export/` for the chosen student: the files, `manifest.json` and a `README.md` for whoever receives them;
    returns False where they were there.

    Raises:
        InputError: no student, or none that can be exported.
        ParityError: a file could not be made or does not do what the student does, and is not left behind; the others
            are there.
    """
    directory = Path(recipe.run_dir) / "export"
    if recipe.stage == "all" and is_untrained(chosen_student(recipe)):
        accelerator.print("export: the student was not trained, and there is nothing to hand over")
        return False
    inputs = export_inputs(recipe)
    if is_current(directory / "manifest.json", inputs, accelerator):
        return False
    failure: ParityError | None = None
    if accelerator.is_main_process:
        try:
            write_export(recipe, directory, inputs, accelerator.print)
        except ParityError as error:
            failure = error
    accelerator.wait_for_everyone()
    if failure is not None:
        raise failure
    return True


def export_inputs(recipe: Recipe) -> dict[str, Any]:
    """What an export depends on; the decoder's file goes by its size and time, for it may have gigabytes."""
    checkpoint = recipe.teacher.checkpoint
    files = weight_files(checkpoint) if checkpoint and Path(checkpoint).exists() else []
    found = [[file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    info = read_info(Path(recipe.cache.dir))
    return {
        "student_sha256": sha256(chosen_student(recipe)),
        "export": {**vars(recipe.export), "formats": wanted_formats(recipe)},
        "teacher": [recipe.teacher.name, found if len(found) > 1 else next(iter(found), None)],
        "cache": info and info.identity.as_json(),
    }


def write_export(recipe: Recipe, directory: Path, inputs: dict[str, Any], say: Callable[[str], None]) -> None:
    """Make, prove and describe every file that is not there, one after the other."""
    subject = load_subject(recipe)
    if subject.note:
        say(f"export: {subject.note}")
    kept = clear(directory, inputs)
    formats = wanted_formats(recipe)
    for kind in [kind for kind in formats if kind not in recipe.export.formats]:  # it was all that was asked for
        if reason := refusal(kind, subject.image_size, subject.channels):
            say(f"export: {reason}, and is left out")
            formats.remove(kind)
    wanted = [name for kind in formats for name in FORMATS[kind] if name not in kept]
    if recipe.export.input == "native" and subject.encoder is subject.whole:
        say(f"export: export.input=native changes nothing, for {subject.name} looks at all {subject.image_size} px")
    with conversions(recipe, wanted) as coreml:
        rows, images_from = validation_rows(recipe, subject.image_size)
        reference = Reference(subject.encoder, subject.sam, rows, images_from)
        say(f"export: every file is compared with PyTorch on {len(rows)} {images_from}")
        functions = makers(recipe, subject, coreml, reference)
        files, failures = make_files({directory / name: functions[name] for name in wanted}, say)
    manifest: dict[str, Any] = {
        "student": {
            "name": subject.name,
            "image_size": subject.image_size,
            "input_size": reference.image_size,
            **native_masks(subject, reference),
            "embed_dim": reference.channels,
            "parameters": sum(parameter.numel() for parameter in subject.encoder.parameters()),
        },
        "teacher": subject.teacher,
        "recipe": subject.recipe,
        "note": subject.note,
        "versions": installed_versions(TOOLS),
        "files": {name: entry for name, entry in {**kept, **files}.items() if (directory / name).exists()},
        "made_from": inputs,
    }
    if failures:  # the next run tries again, for what these were made from is not said in full
        manifest |= {"failures": failures, "made_from": {"student_sha256": inputs["student_sha256"]}}
    write_readme(directory / "README.md", manifest)
    write_json(directory / "manifest.json", manifest)
    if failures:
        raise ParityError("; ".join(failures))


def native_masks(subject: Subject, reference: Reference) -> dict[str, Any]:
    """Of encoders that take fewer pixels than `image_size`: the mean IoU of their masks with those of the encoder that
    reduces the whole image itself, as it does in training. Here that image is reduced before; a photograph that is
    resized at once differs more (docs/students.md)."""
    if reference.image_size == subject.image_size:
        return {}
    whole = Reference(subject.whole, subject.sam, reference.rows, reference.images_from)
    return {"mask_miou_with_whole_images": reference.agreement(whole)}


def make_files(functions: dict[Path, Make], say: Callable[[str], None]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What the manifest says of every file that was made and proven, and a line for each that was not."""
    files, failures = {}, []
    for path, make in functions.items():
        started = time.perf_counter()
        say(f"export: {path.name} ...")
        try:
            described = make(path)
        except (ParityError, InputError) as error:
            failures.append(str(error) if path.name in str(error) else f"{path.name} {error}")
            continue
        except Exception as error:  # others' converters raise of many kinds; the other files can be made all the same
            traceback.print_exc()
            failures.append(f"{path.name} could not be made: {type(error).__name__}: {first_line(error)}")
            continue
        files[path.name] = {"sha256": digest(path), "bytes": size(path), **described}
        say(f"export: {file_line(path.name, files[path.name])} ({time.perf_counter() - started:.0f} s)")
    return files, failures


def clear(directory: Path, inputs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Remove what a killed export left half-written, and what was made from something else; returns what the manifest
    says of the files that can stay."""
    for leftover in directory.glob(f"{TEMPORARY}*"):
        remove(leftover)
    manifest = directory / "manifest.json"
    earlier = read_json(manifest) if manifest.exists() else {}
    if _but_for_formats(earlier.get("made_from", {})) == _but_for_formats(as_stored(inputs)):
        return {name: entry for name, entry in earlier["files"].items() if is_whole(directory / name, entry)}
    ours = [name for names in FORMATS.values() for name in names]
    for stale in ("manifest.json", "README.md", "decoder_cvat.onnx", *ours):  # the last of an earlier version
        remove(directory / stale)
    return {}


def _but_for_formats(inputs: dict[str, Any]) -> dict[str, Any]:
    settings = inputs.get("export") or {}
    return {**inputs, "export": {key: value for key, value in settings.items() if key != "formats"}}


def makers(recipe: Recipe, subject: Subject, coreml: Conversions, reference: Reference) -> dict[str, Make]:
    """The function that makes each file; what several are made of is made once."""
    encoder, size, opset = RgbEncoder(subject.encoder).eval(), subject.image_size, recipe.export.opset
    origin = Origin(subject.name, subject.teacher, subject.recipe)
    exported = cache(
        lambda: marked(encoder_model(encoder, recipe.export.dynamic_batch, NEWEST_OPSET), subject.fingerprint)
    )
    onnx = cache(lambda: in_opset(deepcopy(exported()), opset))
    low_res = cache(lambda single: marked(low_res_model(subject.sam, single, opset), subject.fingerprint))

    def coreml_encoder(path: Path) -> dict[str, Any]:
        return export_coreml_encoder(coreml.model(path.name), reference, path, origin, BITS[path.name])

    def onnx_decoder(path: Path, single: bool = True, crop: bool = False) -> dict[str, Any]:
        return export_onnx_decoder(decoder_model(low_res(single), crop), reference, path)

    def picture_encoder(path: Path, uint8: bool) -> dict[str, Any]:
        return export_picture_encoder(picture_encoder_model(onnx(), uint8), reference, path)

    def int8(path: Path) -> dict[str, Any]:
        pictures = [resize_longest_side(each, encoder.image_size) for each in calibration_pictures(recipe, size)]
        return export_int8_encoder(exported(), reference, path, pictures, opset)

    def client(path: Path, functions: dict[str, Make]) -> dict[str, Any]:
        """A tool's folder: files that are proven as any, and what the tool wants beside them."""
        if reason := refusal(path.name, size, subject.channels):
            raise InputError(reason)
        with whole_directory(path) as folder:
            folder.mkdir()
            described = {name: make(folder / name) for name, make in functions.items()}
            facts = {"name": slug(subject.name), "title": subject.name, "fingerprint": subject.fingerprint or ""}
            write_client(path.name, folder, {**facts, "size": size})
            contents = sorted(file.name for file in folder.iterdir())
        parity = next(iter(described.values()))["parity"]
        return {
            "format": "folder",
            "precision": "float32",
            "contents": contents,
            "files": described,
            "parity": parity,
        }

    encoder_file = Once(lambda path: export_onnx_encoder(onnx(), reference, path))
    decoder_file = Once(onnx_decoder)
    cropped = partial(onnx_decoder, crop=True)
    pictured = {f"encoder_hwc{end}.onnx": partial(picture_encoder, uint8=bool(end)) for end in ("", "_uint8")}
    return {
        "encoder.onnx": encoder_file,
        "encoder_fp16.onnx": lambda path: export_onnx_encoder(onnx(), reference, path, float16=True),
        "encoder_int8.onnx": int8,
        "decoder.onnx": decoder_file,
        "decoder_multimask.onnx": partial(onnx_decoder, single=False),
        "cvat": partial(client, functions={"encoder.onnx": encoder_file, "decoder.onnx": cropped}),
        "anylabeling": partial(client, functions={**pictured, "decoder.onnx": decoder_file}),
        "label_studio": partial(client, functions={"encoder.onnx": encoder_file, "decoder.onnx": decoder_file}),
        **dict.fromkeys(BITS, coreml_encoder),
        DECODER: lambda path: export_coreml_decoder(coreml.model(path.name), reference, path, origin),
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


def file_line(name: str, entry: dict[str, Any]) -> str:
    """A file in a line: size and how it compares with PyTorch."""
    parity = entry["parity"]
    words = [f"{entry['bytes'] / 1e6:.1f} MB"]
    if "relative_error" in parity:
        words.append(f"relative error {parity['relative_error']:.1g}")
    else:
        words.append(f"differs from PyTorch by {parity['max_difference']:.1g}")
    if parity["mask_miou"] is not None:
        words.append(f"mask mIoU {parity['mask_miou']:.4f}")
    if (empty := parity.get("empty_masks", 0)) and empty > parity["masks"] / 2:
        words.append(f"{empty} of {parity['masks']} masks are empty")
    if entry["precision"] == WEIGHTS_ALONE:
        words.append("only weights are in 8 bits")
    elif entry.get("operators_in_float"):
        words.append(f"{len(entry['operators_in_float'])} operators stay float")
    return f"{name:<22} {', '.join(words)}"
