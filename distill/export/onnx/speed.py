"""How fast a file is beside another, here and now."""

import time
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime

from distill.export.onnx.file import open_session

TURNS = 15
"""Runs of each that are timed, after one that is not."""


def times_as_fast(model: Path | bytes, baseline_model: Path | bytes) -> float:
    """The median of a baseline's time over a model's on one image: on one core, for with several the same two files
    came to anything between 0.86 and 1.42, and in turns, so that a machine that is busy slows both."""
    session, baseline = (open_session(each, intra_op_num_threads=1) for each in (model, baseline_model))
    (taken,) = session.get_inputs()
    shape = [side if isinstance(side, int) else 1 for side in taken.shape]
    image = {taken.name: np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)}
    for each in (session, baseline):
        each.run(None, image)
    return median(_seconds(baseline, image) / _seconds(session, image) for _ in range(TURNS))


def _seconds(session: onnxruntime.InferenceSession, image: dict[str, np.ndarray]) -> float:
    began = time.perf_counter()
    session.run(None, image)
    return time.perf_counter() - began
