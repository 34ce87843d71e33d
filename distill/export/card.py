"""What is known of a student beside its files: what it learnt from, how good it is, what it is not for."""

from pathlib import Path
from typing import Any

from distill.export.subject import Subject
from distill.recipe import Recipe
from distill.recipe_files import parse_yaml
from distill.run import chosen_student, read_section
from embeddings_cache.images import scene_count
from embeddings_cache.system import sha256
from students import is_our_student, read_metadata

MEANS = ("student_teacher", "student_truth", "teacher_truth")
"""Whose masks an evaluation compares."""


def card_of(recipe: Recipe, subject: Subject) -> dict[str, Any]:
    """What a manifest says of it, and the cards that are made of that.

    Returns:
        `license`; `learnt`, facts by name; `only_scenes`, whether it has seen no photograph; `evaluation`, None where
        there is none of these weights; `limits`, sentences.
    """
    only_scenes = bool(scene_count((_recipe_of(recipe).get("data") or {}).get("images")))
    return {
        "license": subject.license,
        "learnt": _learnt(recipe),
        "only_scenes": only_scenes,
        "evaluation": _summary(masks_evaluation(recipe), recipe),
        "limits": _limits(only_scenes, subject.image_size),
    }


def masks_evaluation(recipe: Recipe) -> dict[str, Any] | None:
    """What `evaluation.json` says of the masks of this very student; None where it says nothing."""
    scores = read_section(Path(recipe.run_dir) / "evaluation.json", "masks")
    known = scores is not None and scores["made_from"].get("student_sha256") == sha256(chosen_student(recipe))
    return scores if known else None


def _summary(scores: dict[str, Any] | None, recipe: Recipe) -> dict[str, Any] | None:
    if scores is None:
        return None
    means = {prompt: sizes["all"] for prompt, sizes in scores["miou"].items()}
    data = recipe.evaluate.data
    return {
        "images": scores["images"],
        "on": f"of `{Path(str(data)).name}`" if data else "held out of training",
        "masks": max((found["masks"] for found in means.values()), default=0),
        "miou": {prompt: {name: found.get(name) for name in MEANS} for prompt, found in means.items()},
    }


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


def _limits(only_scenes: bool, image_size: int) -> list[str]:
    """What is to be said against it."""
    limits = ["It has seen generated scenes alone. It is not for photographs."] if only_scenes else []
    return [
        *limits,
        "It imitates its teacher, and is wrong where the teacher is; SAM's own limits and biases are its own as well.",
        f"Pictures are looked at with a longest side of {image_size} px: what is small in a large one is lost.",
        "Nobody has looked at how it does on groups of people or in a field where errors do harm.",
    ]
