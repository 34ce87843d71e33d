"""Report: what a run came to, as JSON and as two pictures."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image

from distill.evaluate.masks import (
    embed_both,
    evaluation_inputs,
    evaluation_rows,
    load_sams,
    make_prompts,
    predict_masks,
)
from distill.recipe import Recipe
from distill.run import as_stored, is_current, read_metrics
from embeddings_cache.codec import CacheRow
from embeddings_cache.files import read_json, sha256, whole_file, write_json
from embeddings_cache.format import software_versions
from students import InputError

SHOWN_MASKS = 8


def report(recipe: Recipe, accelerator: Accelerator) -> None:
    """Write `report/`: `report.json`, `loss.png` and `masks.png`.

    Raises:
        InputError: there is no evaluation of this student with these settings.
    """
    run_dir = Path(recipe.run_dir)
    evaluation, manifest = run_dir / "evaluation.json", run_dir / "export" / "manifest.json"
    if not evaluation.exists() or read_json(evaluation)["made_from"] != as_stored(evaluation_inputs(recipe)):
        raise InputError(f"{evaluation} is missing, or of another student or setting: run stage=evaluate first")
    sources = [path for path in (evaluation, run_dir / "metrics.jsonl", manifest) if path.exists()]
    inputs = {path.name: sha256(path) for path in sources}
    result = run_dir / "report" / "report.json"
    if not is_current(result, inputs, accelerator) and accelerator.is_main_process:
        scores = read_json(evaluation)
        exported = read_json(manifest) if manifest.exists() else {"files": {}, "made_from": {}}
        if exported["made_from"].get("student_sha256") != scores["made_from"]["student_sha256"]:
            exported["files"] = {}  # of another student
        # Another student, or other images, have not the curves of this run's training.
        lines = read_metrics(run_dir) if recipe.checkpoint is None and recipe.evaluate.data is None else []
        pictures = {"masks.png": draw_masks(recipe, scores["student_teacher_miou_by_image"], accelerator.device)}
        if lines:
            pictures["loss.png"] = draw_curves(lines)
        for name, figure in pictures.items():
            with whole_file(result.parent / name) as temporary:
                figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
        write_json(
            result,
            {
                "recipe": recipe.name,
                "teacher": recipe.teacher.name,
                "student": scores["student"],
                "data": recipe.evaluate.data or recipe.data.images,
                "held_out_mse_by_step": [[line["step"], line["val_mse"]] for line in lines if "val_mse" in line],
                "evaluation": {name: scores[name] for name in ("images", "embedding", "miou")},
                "export": exported["files"],
                "software": software_versions(),
                "files": sorted(pictures),
                "made_from": inputs,
            },
        )
    accelerator.wait_for_everyone()
    accelerator.print(summary(recipe, read_json(result)))


def summary(recipe: Recipe, content: dict[str, Any]) -> str:
    """The report in a few lines for the terminal."""
    evaluation = content["evaluation"]
    lines = [f"{content['student']} after {content['teacher']}, {evaluation['images']} images"]
    held_out = content["held_out_mse_by_step"]
    start = f" (untrained {held_out[0][1]:.3f})" if held_out else ""
    lines.append(f"  embedding   mse {evaluation['embedding']['mse']:.4f}{start}")
    for prompt, sizes in evaluation["miou"].items():
        means = sizes["all"]
        truth = f", truth {means['student_truth']:.3f}" if "student_truth" in means else ""
        truth += f" (teacher's own {means['teacher_truth']:.3f})" if "teacher_truth" in means else ""
        lines.append(f"  mIoU {prompt:<6} student with teacher {means['student_teacher']:.3f}{truth}")
    lines += [
        f"  {name:<11} {entry['bytes'] / 1e6:.1f} MB, differs from PyTorch by {entry['parity']['max_difference']:.1g}"
        for name, entry in content["export"].items()
    ]
    lines.append(f"  report      {Path(recipe.run_dir) / 'report'}")
    return "\n".join(lines)


def draw_curves(lines: list[dict[str, Any]]) -> Figure:
    """Training loss and held-out embedding MSE over steps."""
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="embedding MSE", yscale="log")
    for name, label, style in (("loss", "training", "-"), ("val_mse", "held out", "o-")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=3)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_masks(recipe: Recipe, by_image: dict[str, float], device: torch.device) -> Figure:
    """Best, median and worst held-out image: picture, ground truth, teacher's masks, student's masks."""
    ranked = sorted(by_image, key=lambda key: -by_image[key])
    shown = dict.fromkeys([ranked[0], ranked[len(ranked) // 2], ranked[-1]])
    teacher, student_sam = load_sams(recipe, device)
    rows = {row.key: row for row in evaluation_rows(recipe, teacher, wanted=shown.__contains__)}

    figure = Figure(figsize=(12, 3.2 * len(shown)))
    for line, key in enumerate(shown):
        student, original = embed_both(rows[key], student_sam)
        prompts = make_prompts(rows[key], recipe)
        points = prompts.points[:SHOWN_MASKS]
        boxes = prompts.boxes[:SHOWN_MASKS] if prompts.boxes is not None else None
        asked = {"boxes": boxes} if boxes is not None else {"points": points}
        panels = {
            f"{key}, mIoU {by_image[key]:.2f}": None,
            "annotated": prompts.masks[:SHOWN_MASKS] if prompts.masks is not None else None,
            "teacher": list(predict_masks(teacher, original, rows[key], **asked)),
            "student": list(predict_masks(teacher, student, rows[key], **asked)),
        }
        for column, (title, masks) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(len(shown), 4, 4 * line + column)
            axes.imshow(_overlay(rows[key], masks))
            axes.set_title(title, fontsize=9)
            axes.axis("off")
    return figure


def _overlay(row: CacheRow, masks: Any) -> np.ndarray:
    """The picture at its original size with masks laid over it, the largest lowest; uint8 (H, W, 3)."""
    height, width = row.original_size
    picture = np.asarray(Image.fromarray(row.pixels()).resize((width, height))).astype(np.float32)
    colours = matplotlib.colormaps["tab10"](range(10))[:, :3]
    for number, mask in sorted(enumerate(masks if masks is not None else ()), key=lambda item: -item[1].sum()):
        picture[mask] = 0.4 * picture[mask] + 0.6 * 255 * np.array(colours[number % len(colours)])
    return picture.astype(np.uint8)
