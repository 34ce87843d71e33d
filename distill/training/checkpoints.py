"""All state of a run on disk, so that the same command goes on from it after any fault."""

import json
import math
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from timm.utils import ModelEmaV3

from distill.run import finished_checkpoints
from embeddings_cache.system import TEMPORARY, publish, read_json, write_json
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
        # What decides is kept in memory: of a disk that machines share, one may see an older state than another.
        self.latest, self.best_miou, self.best_name = 0, -math.inf, ""

    def save(self, step: int, student: StudentEncoder) -> None:
        """Write the checkpoint of a step, unless it is there."""
        final, temporary = self._at(step), self.directory / f"{TEMPORARY}step"
        if step == self.latest:
            return
        self.latest = step
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
        """Keep this step's student where none before had as high a score."""
        if score <= self.best_miou:
            return
        self.save(step, student)
        self.best_miou, self.best_name = score, self._at(step).name
        if self.accelerator.is_main_process:
            write_json(self.directory / "best.json", {"step": step, "miou": score, "checkpoint": self.best_name})
            self._remove_old()

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
        found, best = self.all(), self.directory / "best.json"
        if self.accelerator.is_main_process:
            for leftover in self.directory.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        seen = [path.name for path in found[-1:]], read_json(best) if best.exists() else None
        if any(others != seen for others in gather_object([seen])):
            raise InputError(f"processes find different checkpoints in {self.directory}: machines must share run_dir")
        if not found:
            return 0
        latest = found[-1]
        if seen[1] is not None:
            self.best_miou, self.best_name = seen[1]["miou"], seen[1]["checkpoint"]
        self.accelerator.print(f"train: going on from {latest}")
        try:
            about, kept = read_json(latest / "checkpoint.json"), load_student(latest / STUDENT)
            if kept.config != student.config:
                raise InputError(f"it is of another student, {kept.config}, not {student.config}")
            self.accelerator.load_state(str(latest))
            if average is not None:
                average.module.load_state_dict(kept.state_dict())
        except torch.OutOfMemoryError:
            raise  # says nothing of the file
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
        self.latest = int(about["step"])
        return self.latest

    def kept(self) -> str:
        """What there is to go on from, in words."""
        found = self.all()
        return f"{found[-1]} is from before" if found else "There is no checkpoint yet"

    def all(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return finished_checkpoints(self.directory)

    def _at(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _remove_old(self) -> None:
        for old in self.all()[: -self.keep]:
            if old.name != self.best_name:
                doomed = old.with_name(f"{TEMPORARY}{old.name}")  # half of it must not pass for a checkpoint
                old.rename(doomed)
                shutil.rmtree(doomed)
