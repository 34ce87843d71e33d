"""What is known of a student beside its files: what it learnt from, how good it is, what it is not for."""

from pathlib import Path
from typing import Any

from distill.export.subject import Subject, saw_scenes_alone, trained_by
from distill.recipe import Recipe
from distill.run import chosen_student, read_section
from embeddings_cache.images import scene_count
from embeddings_cache.system import sha256

MEANS = ("student_teacher", "student_truth", "teacher_truth")
"""Whose masks an evaluation compares."""


def card_of(recipe: Recipe, subject: Subject) -> dict[str, Any]:
    """What a manifest says of it, and the cards that are made of that.

    Returns:
        `license`; `learnt`, facts by name; `only_scenes`, whether it has seen no photograph; `evaluation`, None where
        there is none of these weights; `limits`, sentences.
    """
    kept = trained_by(recipe)
    only_scenes = saw_scenes_alone(kept)
    return {
        "license": subject.license,
        "learnt": _learnt(kept),
        "only_scenes": only_scenes,
        "evaluation": _summary(masks_evaluation(recipe)),
        "limits": _limits(only_scenes, subject.image_size),
    }


def masks_evaluation(recipe: Recipe) -> dict[str, Any] | None:
    """What `evaluation.json` says of the masks of this very student; None where it says nothing."""
    scores = read_section(Path(recipe.run_dir) / "evaluation.json", "masks")
    known = scores is not None and scores["made_from"].get("student_sha256") == sha256(chosen_student(recipe))
    return scores if known else None


def iou(mean: float | None) -> str:
    """As cards show it."""
    return "–" if mean is None else f"{mean:.3f}"


def _summary(scores: dict[str, Any] | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    means = {prompt: sizes["all"] for prompt, sizes in scores["miou"].items()}
    data = scores["made_from"]["evaluate"]["data"]
    return {
        "images": scores["images"],
        "on": f"of {_last_names(data)}" if data else "held out of training",
        "masks": max((found["masks"] for found in means.values()), default=0),
        "miou": {prompt: {name: found.get(name) for name in MEANS} for prompt, found in means.items()},
    }


def _learnt(kept: dict[str, Any]) -> dict[str, str]:
    """What the student learnt from, as far as its recipe says."""
    if not kept:
        return {"Training": "nothing is known of it: the checkpoint was published without a recipe"}
    teacher, student, data, train = (kept.get(part) or {} for part in ("teacher", "student", "data", "train"))
    toy = " (the small stand-in of sam-distill, no SAM that segments photographs)"
    images, fraction = data.get("images"), data.get("fraction", 1)
    scenes = scene_count(images)
    phases = train.get("then") or []
    losses = " + ".join(f"{weight:g} × {name}" for name, weight in (train.get("loss") or {}).items())
    began = {False: "none", None: "none", True: "timm's", "auto": "timm's, if they were to be had"}.get(
        student.get("pretrained"), "a file's"
    )
    facts = {
        "Teacher": teacher.get("name") and f"`{teacher['name']}`{toy if teacher['name'] == 'toy' else ''}",
        "Images": images
        and (f"{scenes:,} generated scenes" if scenes else _last_names(images))
        + ("" if fraction == 1 else f", {fraction:.3g} of them"),
        "Loss": losses and losses + (f", and in {len(phases)} more phases as the recipe says" if phases else ""),
        "Passes over the images": train.get("epochs")
        and str(train["epochs"] + sum(phase.get("epochs", 1) for phase in phases)),
        "Images a step": train.get("batch_size") and str(train["batch_size"]),
        "ImageNet weights to begin with": student and began,
        "Student to begin with": student.get("start") and _last_names(student["start"]),
    }
    return {name: text for name, text in facts.items() if text}


def _last_names(sources: Any) -> str:
    """Of paths and URLs, one or several: where they lie is nobody's business."""
    each = [str(source).rstrip("/") for source in (sources if isinstance(sources, list) else [sources])]
    return ", ".join(f"`{source.rsplit('/')[-1]}`" for source in each)


def _limits(only_scenes: bool, image_size: int) -> list[str]:
    """What is to be said against it."""
    limits = ["It has seen generated scenes alone. It is not for photographs."] if only_scenes else []
    return [
        *limits,
        "It imitates its teacher, and is wrong where the teacher is; SAM's own limits and biases are its own as well.",
        f"Pictures are looked at with a longest side of {image_size} px: what is small in a large one is lost.",
        "Nobody has looked at how it does on groups of people or in a field where errors do harm.",
    ]
