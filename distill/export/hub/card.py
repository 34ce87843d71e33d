"""The model card: what is known of a student from its run, and what is not."""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from distill.export.card import card_of, iou, masks_evaluation
from distill.export.subject import NOT_SAID, Subject
from distill.recipe import Recipe
from embeddings_cache.system import read_json

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

UNSAID = "license_name: to-be-filled-in"
"""What the card says of its licence until somebody has decided on one."""

HUB_LICENSES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "mpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0",
)  # fmt: skip
"""Some of the identifiers that https://huggingface.co/docs/hub/repositories-licenses lists."""


def write_card(
    folder: Path, recipe: Recipe, subject: Subject, parity: dict[str, Any], versions: dict[str, str]
) -> None:
    """Write `README.md`, and beside it the run's picture of masks, if there is one of this student."""
    card, picture = card_of(recipe, subject), _picture_of(recipe)
    if picture is not None:
        shutil.copyfile(picture, folder / PICTURE)
    jinja = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    jinja.filters |= {"iou": iou, "bytes": _readable}
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
        card=card,
        hub_license=_front_matter(subject.license),
        versions=versions,
        picture=PICTURE if picture else None,
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


def _picture_of(recipe: Recipe) -> Path | None:
    """The report's picture of this very student's masks; None where there is none."""
    scores, folder = masks_evaluation(recipe), Path(recipe.run_dir) / "report"
    if scores is None or not all((folder / name).exists() for name in ("report.json", PICTURE)):
        return None
    told = read_json(folder / "report.json")["evaluation"] or {}
    return folder / PICTURE if told.get("miou") == scores["miou"] else None


def _front_matter(license: str) -> str:
    """What the hub reads of a licence: one that it knows by its identifier, another by a name."""
    if license == NOT_SAID:
        return f"license: other\n{UNSAID}"
    known = license.lower()
    return f"license: {known}" if known in HUB_LICENSES else f"license: other\nlicense_name: {json.dumps(license)}"


def _readable(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
