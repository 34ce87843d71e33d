"""Report: what a run came to, as a page to read, as JSON, and as a picture."""

import platform
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from matplotlib.figure import Figure

from distill.evaluate.contestants import digest_of
from distill.evaluate.masks import SIZES, evaluation_inputs
from distill.export.folder import file_line
from distill.recipe import Recipe, to_yaml
from distill.report.cases import Case, draw_cases
from distill.report.page import render_page
from distill.run import as_stored, chosen_student, is_current, read_metrics, read_section, stage_times
from distill.schema import TASKS
from embeddings_cache.shards import software_versions
from embeddings_cache.system import read_json, sha256, whole_file, write_json
from students import InputError, load_student

CURVES = ("loss", "val_mse", "val_miou_point", "val_miou_box")
"""Lines of `metrics.jsonl` that are worth a curve."""


def report(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Write `report/`: `index.html`, which needs nothing beside it, `report.json` and `masks.png`.

    Returns:
        False where the report was there.

    Raises:
        InputError: there is no evaluation of this student with these settings.
    """
    run_dir = Path(recipe.run_dir)
    evaluation, manifest = run_dir / "evaluation.json", run_dir / "export" / "manifest.json"
    scores = read_section(evaluation, "masks")
    if scores is None or scores["made_from"] != as_stored(evaluation_inputs(recipe)):
        raise InputError(f"{evaluation} is missing, or of another student or setting: run stage=evaluate first")
    sources = (evaluation, run_dir / "metrics.jsonl", manifest, run_dir / "benchmark.json")
    times = {
        stage: time["seconds"] for stage, time in stage_times(recipe).items() if stage != "report" and time["finished"]
    }
    inputs = {"files": {path.name: sha256(path) for path in sources if path.exists()}, "seconds_by_stage": times}
    result = run_dir / "report" / "report.json"
    worked = not is_current(result, inputs, accelerator)
    if worked and accelerator.is_main_process:
        content = {**collect(recipe, scores, manifest), "seconds_by_stage": times}
        cases = draw_cases(recipe, scores["student_teacher_miou_by_image"], accelerator.device)
        with whole_file(result.parent / "masks.png") as temporary:
            masks_figure(cases).savefig(temporary, format="png", dpi=110, bbox_inches="tight")
        with whole_file(result.parent / "index.html") as temporary:
            temporary.write_text(render_page(content, cases), encoding="utf-8")
        write_json(result, {**content, "files": ["index.html", "masks.png"], "made_from": inputs})
    accelerator.wait_for_everyone()
    accelerator.print(summary(recipe, read_json(result)))
    return worked


def collect(recipe: Recipe, scores: dict[str, Any], manifest: Path) -> dict[str, Any]:
    """Everything that the report says, as plain data."""
    run_dir = Path(recipe.run_dir)
    student = load_student(chosen_student(recipe))
    exported = read_json(manifest) if manifest.exists() else {"files": {}, "made_from": {}}
    if exported.get("made_from", {}).get("student_sha256") != scores["made_from"]["student_sha256"]:
        exported["files"] = {}  # of another student
    # A student from elsewhere, or other images, have not the curves of this run's training.
    lines = read_metrics(run_dir) if recipe.checkpoint is None and recipe.evaluate.data is None else []
    benchmark = run_dir / "benchmark.json"
    measured = read_json(benchmark) if benchmark.exists() and recipe.checkpoint is None else {}
    return {
        "recipe": recipe.name,
        "settings": yaml.safe_load(to_yaml(recipe)),
        "teacher": {"name": recipe.teacher.name, "checkpoint": recipe.teacher.checkpoint},
        "student": {"name": student.config.name, "parameters": sum(p.numel() for p in student.parameters())},
        "data": {"images": recipe.data.images, "fraction": recipe.data.fraction, "evaluated_on": recipe.evaluate.data},
        "software": {"python": platform.python_version(), **software_versions()},
        "machine": platform.platform(),
        "curves": {name: [[line["step"], line[name]] for line in lines if name in line] for name in CURVES},
        "evaluation": {name: scores[name] for name in ("images", "embedding", "miou")},
        "tasks": {
            name: current_results(section)
            for name in TASKS
            if name != "masks" and (section := read_section(run_dir / "evaluation.json", name))
        },
        "size_limits_px": {size: [low, high if high < float("inf") else None] for size, (low, high) in SIZES.items()},
        "export": exported["files"],
        "benchmark": measured.get("students") if isinstance(measured, dict) else None,
    }


def current_results(section: dict[str, Any]) -> dict[str, Any]:
    """What a zero-shot task came to, without the contestants whose file is another one by now."""
    changed = {
        name
        for name, path in section["checkpoints"].items()
        if Path(path).exists()
        and digest_of(path) != section["made_from"]["contestants"][name]["contestant"].get("sha256")
    }
    results = {name: numbers for name, numbers in section["results"].items() if name not in changed}
    return {**{key: section[key] for key in ("unit", "columns", "limit")}, "results": results}


def summary(recipe: Recipe, content: dict[str, Any]) -> str:
    """The report in a few lines for the terminal."""
    evaluation, student = content["evaluation"], content["student"]
    size = f"{student['parameters'] / 1e6:.1f} M parameters"
    lines = [f"{student['name']} ({size}) after {content['teacher']['name']}, {evaluation['images']} images"]
    held_out = content["curves"]["val_mse"]
    start = f" (untrained {held_out[0][1]:.3f})" if held_out else ""
    lines.append(f"  embedding   mse {evaluation['embedding']['mse']:.4f}{start}")
    for prompt, sizes in evaluation["miou"].items():
        means = sizes["all"]
        told = [f"student with teacher {means['student_teacher']:.3f}"] if "student_teacher" in means else []
        if "student_truth" in means:
            told.append(f"with the truth: teacher {means['teacher_truth']:.3f}, student {means['student_truth']:.3f}")
        line = f"  mIoU {prompt:<8} {'; '.join(told)}"
        if means.get("teacher_truth"):
            line += f" ({means['student_truth'] / means['teacher_truth']:.0%} of the teacher's)"
        lines.append(line)
    lines += [f"  {file_line(name, entry)}" for name, entry in content["export"].items()]
    lines.append(f"  report      {Path(recipe.run_dir) / 'report' / 'index.html'}")
    return "\n".join(lines)


def masks_figure(cases: list[Case]) -> Figure:
    """The cases as one picture, a row each."""
    figure = Figure(figsize=(12, 3.1 * len(cases)))
    for line, case in enumerate(cases):
        for column, (title, picture) in enumerate(case.panels.items()):
            axes = figure.add_subplot(len(cases), len(case.panels), len(case.panels) * line + column + 1)
            axes.imshow(picture)
            axes.set_title(f"{case.rank}, mIoU {case.miou:.2f}" if column == 0 else title, fontsize=10)
            axes.axis("off")
    figure.tight_layout()
    return figure
