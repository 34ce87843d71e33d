"""All state of a run on disk, so that the same command goes on from it after any fault."""

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from timm.utils import ModelEmaV3

from embeddings_cache.files import TEMPORARY, publish, read_json, write_json
from students import InputError, StudentEncoder, first_line, load_student, save_student

STUDENT = "student.safetensors"
UNREADABLE = (OSError, SafetensorError, RuntimeError, ValueError, KeyError, EOFError, pickle.PickleError, BadZipFile)


class Checkpoints:
    """`checkpoints/step-NNNNNNNN/`, each whole or not there; the last few and the best one are kept.

    One holds what Accelerate saves (weights, optimizer, scaler, random number generators of each process), and
    `student.safetensors`: the student as it would be handed out, which evaluate and export take as `checkpoint=`.
    """

    def __init__(self, directory: Path, accelerator: Accelerator, keep: int, metadata: Mapping[str, str]) -> None:
        self.directory, self.accelerator, self.keep, self.metadata = directory, accelerator, keep, metadata

    def save(self, step: int, student: StudentEncoder) -> None:
        """Write the checkpoint of a step, unless it is there."""
        final, temporary = self._at(step), self.directory / f"{TEMPORARY}step"
        there = final.exists()
        self.accelerator.wait_for_everyone()
        if there:
            return
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            save_student(temporary / STUDENT, student, {**self.metadata, "steps": str(step)})
            about = {"step": step, "processes": self.accelerator.num_processes}
            (temporary / "checkpoint.json").write_text(json.dumps(about), encoding="utf-8")
            publish(temporary, final)
            self._remove_old()

    def save_if_best(self, step: int, student: StudentEncoder, score: float) -> None:
        """Keep this step's student where none before had a higher score."""
        best = self.best()
        self.accelerator.wait_for_everyone()  # all have looked before it changes
        if best is None or score > best["miou"]:
            if self.accelerator.is_main_process:  # before the checkpoint: without that it does not count
                write_json(
                    self.directory / "best.json", {"step": step, "miou": score, "checkpoint": self._at(step).name}
                )
            self.save(step, student)

    def restore(self, student: StudentEncoder, average: ModelEmaV3 | None) -> int:
        """Load the latest checkpoint into what was prepared, and into `average`.

        Args:
            student: what was prepared, unwrapped.
            average: of its weights, if there is to be one.

        Returns:
            The checkpoint's step, 0 without one.

        Raises:
            InputError: it is damaged, or another student's, or not the same for all processes.
        """
        found = self.all()
        names = {path.name for path in found[-1:]}
        if any(set(others) != names for others in gather_object([list(names)])):
            raise InputError(f"processes find different checkpoints in {self.directory}: machines must share run_dir")
        if not found:
            return 0
        latest = found[-1]
        self.accelerator.print(f"train: going on from {latest}")
        try:
            about, kept = read_json(latest / "checkpoint.json"), load_student(latest / STUDENT)
            if kept.config != student.config:
                raise InputError(f"it is of another student, {kept.config}, not {student.config}")
            self.accelerator.load_state(str(latest))
            if average is not None:
                average.module.load_state_dict(kept.state_dict())
        except (*UNREADABLE, InputError) as error:
            raise InputError(
                f"{latest} cannot be gone on from: {first_line(error)}. Without it the run goes on from "
                f"{found[-2].name if len(found) > 1 else 'the beginning'}"
            ) from error
        if about["processes"] != self.accelerator.num_processes:
            self.accelerator.print(
                f"train: {latest.name} was made by {about['processes']} processes, these are "
                f"{self.accelerator.num_processes}: the images and their order are the same, the last bits are not"
            )
        return int(about["step"])

    def best(self) -> dict | None:
        """`step`, `miou` and `checkpoint` of the student with the best masks so far, if it is there."""
        path = self.directory / "best.json"
        noted = read_json(path) if path.exists() else None
        return noted if noted and (self.directory / noted["checkpoint"]).exists() else None

    def kept(self) -> str:
        """What there is to go on from, in words."""
        found = self.all()
        return f"{found[-1]} is from before" if found else "There is no checkpoint yet"

    def all(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(self.directory.glob("step-*"))

    def _at(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _remove_old(self) -> None:
        best = self.best()
        for old in self.all()[: -self.keep]:
            if best is None or old.name != best["checkpoint"]:
                shutil.rmtree(old)
