"""The model card: what is known of a student from its run, and what is not."""

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from distill.export.subject import Subject
from distill.recipe import Recipe
from distill.recipe_files import parse_yaml
from distill.run import chosen_student, read_section
from embeddings_cache.images import scene_count
from embeddings_cache.system import read_json, sha256
from students import is_our_student, read_metadata

WHAT = {
    "model.safetensors": "weights of encoder, prompt encoder and mask decoder",
    "config.json": "their sizes, and which class reads them",
    "preprocessor_config.json": "how `SamProcessor` resizes, normalises and pads",
    "modeling_sam_student.py": "the model: transformers' `SamModel` around the student",
    "configuration_sam_student.py": "its configuration",
    "encoder.py": "builds the encoder: a timm backbone and a neck",
    "imagenet.py": "says that there are no ImageNet weights here",
}
"""Files of the folder; the others are parts of `encoder.py`."""

PICTURE = "masks.png"


def write_card(
    folder: Path, recipe: Recipe, subject: Subject, parity: dict[str, Any], versions: dict[str, str]
) -> None:
    """Write `README.md`, and beside it the run's picture of masks, if there is one of this student."""
    scores, picture = _evaluation(recipe)
    if picture is not None:
        shutil.copyfile(picture, folder / PICTURE)
    jinja = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    jinja.filters |= {"iou": lambda value: "–" if value is None else f"{value:.3f}", "bytes": _readable}
    names = ("student_teacher", "student_truth", "teacher_truth")
    means = {prompt: sizes["all"] for prompt, sizes in scores["miou"].items()} if scores else {}
    template = (files("distill.export.hub") / "card.md.jinja").read_text(encoding="utf-8")
    text = jinja.from_string(
        template
    ).render(
        name=subject.name,
        size=subject.image_size,
        parameters=sum(parameter.numel() for parameter in subject.whole.parameters()),
        teacher=subject.teacher,
        recipe=subject.recipe,
        note=subject.note,
        scenes=_of_scenes(recipe),
        versions=versions,
        learnt=_learnt(recipe),
        miou={prompt: {name: found.get(name) for name in names} for prompt, found in means.items()},
        masks=max((found["masks"] for found in means.values()), default=0),
        evaluated_images=scores["images"] if scores else 0,
        evaluated_on=_evaluated_on(recipe),
        picture=PICTURE if picture else None,
        limits=_limits(recipe, subject),
        files=[
            {"name": file.name, "bytes": file.stat().st_size, "what": WHAT.get(file.name, "part of `encoder.py`")}
            for file in sorted(folder.iterdir())
            if file.suffix in (".json", ".py", ".safetensors")
        ],
        parity=parity,
        compared_on=parity["images_from"].partition(" of ")[0],  # where they lie is nobody's business
        made_with=", ".join(f"{name} {version}" for name, version in versions.items() if version[:1].isdigit()),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _evaluation(recipe: Recipe) -> tuple[dict[str, Any] | None, Path | None]:
    """What `evaluation.json` says of the masks of this very student, and the report's picture of them; None where there
    is none."""
    run_dir = Path(recipe.run_dir)
    scores = read_section(run_dir / "evaluation.json", "masks")
    if scores is None or scores["made_from"].get("student_sha256") != sha256(chosen_student(recipe)):
        return None, None
    report, picture = run_dir / "report" / "report.json", run_dir / "report" / PICTURE
    told = read_json(report)["evaluation"] if report.exists() and picture.exists() else {}
    current = bool(told) and told.get("miou") == scores["miou"]
    return scores, picture if current else None


def _recipe_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe that trained the student, which lies in its file."""
    path = chosen_student(recipe)
    written = read_metadata(path).get("recipe") if is_our_student(path) else None
    return parse_yaml(written, str(path)) if written else {}


def _learnt(recipe: Recipe) -> dict[str, str]:
    """What the student learnt from, as far as its file says; of paths and URLs the last name alone."""
    kept = _recipe_of(recipe)
    if not kept:
        return {"Training": "nothing is known of it: the checkpoint was published without a recipe"}
    teacher, train, images = kept["teacher"], kept["train"], kept["data"]["images"]
    sources = [str(each) for each in (images if isinstance(images, list) else [images])]
    scenes = scene_count(images)
    share = "" if kept["data"].get("fraction", 1) == 1 else f", {kept['data']['fraction']:.3g} of them"
    named = f"{scenes:,} generated scenes" if scenes else ", ".join(f"`{source.rsplit('/')[-1]}`" for source in sources)
    toy = " (the small stand-in of sam-distill, no SAM that segments photographs)"
    phases = train.get("then") or []
    return {
        "Teacher": f"`{teacher['name']}`{toy if teacher['name'] == 'toy' else ''}",
        "Images": f"{named}{share}",
        "Loss": " + ".join(f"{weight:g} × {name}" for name, weight in train["loss"].items())
        + (f", and in {len(phases)} more phases as the recipe says" if phases else ""),
        "Passes over the images": str(train["epochs"] + sum(phase["epochs"] for phase in phases)),
        "Images a step": str(train["batch_size"]),
        "ImageNet weights to begin with": {False: "none", True: "timm's"}.get(
            kept["student"]["pretrained"], "a file's"
        ),
    }


def _limits(recipe: Recipe, subject: Subject) -> list[str]:
    """What is to be said against it."""
    limits = []
    if _of_scenes(recipe):
        limits.append("It has seen generated scenes alone. It is not for photographs.")
    limits.append(
        "It imitates its teacher, and is wrong where the teacher is; SAM's own limits and biases are its own as well."
    )
    size = subject.image_size
    limits.append(f"Pictures are looked at with a longest side of {size} px: what is small in a large one is lost.")
    limits.append("Nobody has looked at how it does on groups of people or in a field where errors do harm.")
    return limits


def _of_scenes(recipe: Recipe) -> bool:
    return bool(scene_count((_recipe_of(recipe).get("data") or {}).get("images")))


def _evaluated_on(recipe: Recipe) -> str:
    data = recipe.evaluate.data
    return f"of `{Path(str(data)).name}`" if data else "held out of training"


def _readable(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
