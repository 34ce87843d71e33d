"""Report: what the run came to."""

from collections.abc import Collection

from accelerate import Accelerator

from distill.needs import need_decoder, need_student
from distill.recipe import Recipe
from distill.report import report
from embeddings_cache.images import scene_count

REAL_RUN = """\
These were generated scenes and a teacher that knows nothing else; a real run takes photographs and a SAM checkpoint: \
accelerate launch distill.py recipe=repvit_m2_3 teacher.checkpoint=sam_vit_h_4b8939.pth \
data.images='TARS OR FOLDER' data.fraction=1.0"""


def check(recipe: Recipe, before: Collection[str]) -> None:
    """A student, and a teacher with a decoder for the pictures."""
    need_decoder(recipe)
    need_student(recipe, before)


def run(recipe: Recipe, accelerator: Accelerator) -> bool:
    """`distill.report`, and after the quickstart what comes next; returns False where the report was there."""
    worked = report(recipe, accelerator)
    if recipe.stage == "all" and recipe.name == "quickstart" and scene_count(recipe.data.images):
        accelerator.print(REAL_RUN)
    return worked
