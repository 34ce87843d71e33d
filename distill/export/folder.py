"""Export: every format that the recipe names, each proven before it is kept, and the manifest that describes them."""

import math
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from distill.export.card import card_of, masks_evaluation
from distill.export.coreml import conversions
from distill.export.encoder import validation_rows
from distill.export.files import digest, remove, size
from distill.export.handover import write_readme
from distill.export.latency import time_files
from distill.export.makers import Make, makers
from distill.export.onnx import WEIGHTS_ALONE
from distill.export.programs import write_programs
from distill.export.proof import ParityError, Reference
from distill.export.subject import Subject, is_untrained, load_subject, refusal, unfit, wanted_formats
from distill.export.swift import FOLDER as SWIFT
from distill.export.swift import packages_of, write_swift
from distill.export.web import out_of_reach
from distill.recipe import Recipe
from distill.run import as_stored, chosen_student, is_current, is_whole
from distill.schema import COMPRESSED, FORMATS
from embeddings_cache.shards import read_info
from embeddings_cache.system import TEMPORARY, installed_versions, read_json, sha256, write_json
from students import InputError, first_line, weight_files

TOOLS = (
    "sam-distill", "torch", "timm", "segment-anything-py", "onnx", "onnxscript", "onnxruntime", "coremltools", "numpy",
)  # fmt: skip


TOLD = ("page", "evaluation")
"""What an export was made from that is told, and changes no file of weights: in `web/`, and in the README. The model
card of `huggingface/` may have been edited since, and stays."""


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
    formats = wanted_formats(recipe)
    return {
        "student_sha256": sha256(chosen_student(recipe)),
        "export": {**vars(recipe.export), "formats": formats},
        "page": vars(recipe.predict) if "web" in formats else None,
        "evaluation": (masks_evaluation(recipe) or {}).get("made_from"),
        "teacher": [recipe.teacher.name, found if len(found) > 1 else next(iter(found), None)],
        "cache": info and info.identity.as_json(),
    }


def write_export(
    recipe: Recipe, directory: Path, inputs: dict[str, Any], say: Callable[[str], None], timed: bool = True
) -> None:
    """Make, prove and describe every file that is not there, one after the other; `timed`: and say how long they take
    here."""
    subject = load_subject(recipe)
    if subject.note:
        say(f"export: {subject.note}")
    card = card_of(recipe, subject)
    kept, left_out = clear(directory, inputs)
    formats, unfitting = fitting_formats(recipe, subject, kept, say)
    left_out |= unfitting
    called = {name: file_name(name, subject.prefix) for kind in formats for name in FORMATS[kind]}
    unasked = {name for kind in COMPRESSED if kind not in recipe.export.formats for name in FORMATS[kind]}
    dispensable = {called[name] for name in unasked & called.keys()}
    # What was left out before would be again.
    wanted = [name for name in called if called[name] not in kept.keys() | (dispensable & left_out.keys())]
    if recipe.export.input == "native" and subject.encoder is subject.whole:
        say(f"export: export.input=native changes nothing, for {subject.name} looks at all {subject.image_size} px")
    with conversions(recipe, wanted) as coreml:
        rows, images_from = validation_rows(recipe, subject.image_size, recipe.export.images)
        reference = Reference(subject.encoder, subject.sam, rows, images_from)
        say(f"export: every file is compared with PyTorch on {len(rows)} {images_from}")
        functions = makers(recipe, subject, coreml, reference)
        making = {directory / called[name]: functions[name] for name in wanted}
        files, failures, refused = make_files(making, dispensable, say)
    files = {name: entry for name, entry in {**kept, **files}.items() if (directory / name).exists()}
    if timed:
        time_files(directory, files)
    left_out = {name: reason for name, reason in {**left_out, **refused}.items() if name not in files}
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
        "card": card,
        "versions": installed_versions(TOOLS),
        "files": files,
        "left_out": left_out,
        "made_from": inputs,
    }
    if failures:  # the next run tries again, for what these were made from is not said in full
        manifest |= {"failures": failures, "made_from": {"student_sha256": inputs["student_sha256"]}}
    manifest["beside"] = write_programs(directory, files)
    if packages := packages_of(files):
        manifest["beside"][SWIFT] = write_swift(directory / SWIFT, subject, packages)
    write_readme(directory / "README.md", manifest)
    write_json(directory / "manifest.json", manifest)
    if failures:
        raise ParityError("; ".join(failures))


def fitting_formats(
    recipe: Recipe, subject: Subject, kept: Collection[str], say: Callable[[str], None]
) -> tuple[list[str], dict[str, str]]:
    """The formats that can be made of a student here and now, and why others cannot, of which `all` does without.

    Raises:
        InputError: one that was named is among the others.
    """
    formats, unfitting = [], {}
    for kind in wanted_formats(recipe):
        named = kind in recipe.export.formats  # and not all
        reason = unfit(kind, subject) or (None if named else refusal(kind, subject.image_size, subject.channels))
        if kind == "web" and kind not in kept:
            reason = out_of_reach(say)
        if reason and named:
            raise InputError(f"export.formats: {reason}")
        if reason:
            say(f"export: {reason}; it is left out")
            unfitting[kind] = reason
        else:
            formats.append(kind)
    return formats, unfitting


def file_name(name: str, prefix: str) -> str:
    """What a file of `FORMATS` is called: Xcode makes a class of each package, of its name."""
    return prefix + name if name.endswith(".mlpackage") else name


def native_masks(subject: Subject, reference: Reference) -> dict[str, Any]:
    """Of encoders that take fewer pixels than `image_size`: the mean IoU of their masks with those of the encoder that
    reduces the whole image itself, as it does in training. Here that image is reduced before; a photograph that is
    resized at once differs more (docs/students.md)."""
    if reference.image_size == subject.image_size:
        return {}
    whole = Reference(subject.whole, subject.sam, reference.rows, reference.images_from)
    return {"mask_miou_with_whole_images": reference.agreement(whole)}


def make_files(
    functions: dict[Path, Make], dispensable: Collection[str], say: Callable[[str], None]
) -> tuple[dict[str, dict[str, Any]], list[str], dict[str, str]]:
    """Make files, one after the other.

    Args:
        functions: what makes each.
        dispensable: names of those that nobody asked for by name: they are left out where they are no good, or no
            faster than what they stand for.
        say: told what is going on.

    Returns:
        What the manifest says of every file that was made and proven; a line for each that should have been and was
        not; and by name one for each that is left out.
    """
    files: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    left_out: dict[str, str] = {}
    for path, make in functions.items():
        started = time.perf_counter()
        say(f"export: {path.name} ...")
        try:
            described = make(path)
            if path.name in dispensable and described.get("times_as_fast", math.inf) <= 1:
                remove(path)
                raise ParityError(f"{path.name} is {described['times_as_fast']} times as fast as encoder.onnx here")
        except (ParityError, InputError) as error:
            line = str(error) if path.name in str(error) else f"{path.name} {error}"
            if path.name in dispensable and isinstance(error, ParityError):
                left_out[path.name] = line
                say(f"export: {line}; it is left out")
            else:
                failures.append(line)
            continue
        except Exception as error:  # others' converters raise of many kinds; the other files can be made all the same
            traceback.print_exc()
            failures.append(f"{path.name} could not be made: {type(error).__name__}: {first_line(error)}")
            continue
        files[path.name] = {"sha256": digest(path), "bytes": size(path), **described}
        say(f"export: {file_line(path.name, files[path.name])} ({time.perf_counter() - started:.0f} s)")
    return files, failures, left_out


def clear(directory: Path, inputs: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Remove what a killed export left half-written, and what was made from something else; returns what the manifest
    says of the files that can stay, and why others were left out."""
    for leftover in directory.glob(f"{TEMPORARY}*"):
        remove(leftover)
    manifest = directory / "manifest.json"
    earlier = read_json(manifest) if manifest.exists() else {}
    there, made_from = earlier.get("files", {}), earlier.get("made_from", {})
    if _but_for_formats(made_from) == _but_for_formats(as_stored(inputs)):
        kept = {name: entry for name, entry in there.items() if is_whole(directory / name, entry)}
        if (page := as_stored(inputs)["page"]) and page != made_from.get("page"):
            kept.pop("web", None)
        return kept, earlier.get("left_out", {})
    ours = [name for names in FORMATS.values() for name in names]
    named = [name for name in there if name == Path(name).name]
    packages = [path.name for path in directory.glob("*.mlpackage")]
    # The third is an earlier version's.
    for former in ("manifest.json", "README.md", "decoder_cvat.onnx", SWIFT, *ours, *named, *packages):
        remove(directory / former)
    return {}, {}


def _but_for_formats(inputs: dict[str, Any]) -> dict[str, Any]:
    settings = inputs.get("export") or {}
    others = {key: value for key, value in inputs.items() if key not in TOLD}
    return {**others, "export": {key: value for key, value in settings.items() if key != "formats"}}


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
    if "mask_iou_p5" in parity.get("allowed", {}):
        words.append(f"5th percentile {parity['mask_iou_p5']:.3f} of {parity['masks']}")
    if "times_as_fast" in entry:
        words.append(f"{entry['times_as_fast']} times as fast as float32 here")
    if (empty := parity.get("empty_masks", 0)) and empty > parity["masks"] / 2:
        words.append(f"{empty} of {parity['masks']} masks are empty")
    if entry["precision"] == WEIGHTS_ALONE:
        words.append("only weights are in 8 bits")
    elif entry.get("operators_in_float"):
        words.append(f"{len(entry['operators_in_float'])} operators stay float")
    return f"{name:<22} {', '.join(words)}"
