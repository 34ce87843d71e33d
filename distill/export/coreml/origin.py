"""What a package says of where it comes from."""

from dataclasses import dataclass
from typing import Any

from embeddings_cache.system import installed_versions


@dataclass(frozen=True)
class Origin:
    """What a package says of itself."""

    student: str
    teacher: str
    recipe: str | None
    """None for a checkpoint from elsewhere."""
    license: str = ""

    def describe(self) -> str:
        """The student in words."""
        return f"{self.student}, {'converted' if self.recipe is None else f'distilled from {self.teacher}'}"

    def write_to(self, model: Any, description: str) -> None:
        """Describe a Core ML model."""
        model.short_description = description
        model.version = f"sam-distill {installed_versions(['sam-distill'])['sam-distill']}"
        model.license = self.license
        model.user_defined_metadata.update(student=self.student, teacher=self.teacher)
        if self.recipe is not None:
            model.author = "sam-distill"
            model.user_defined_metadata.update(recipe=self.recipe)
