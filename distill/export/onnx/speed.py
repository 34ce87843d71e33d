"""How fast a file is beside another, here and now."""

import time
from statistics import median

import numpy as np
import onnxruntime

TURNS = 9
"""Runs of each that are timed, after one that is not."""


def times_as_fast(session: onnxruntime.InferenceSession, baseline: onnxruntime.InferenceSession) -> float:
    """The median of `baseline`'s time over `session`'s on one image, the two in turns, so that a machine that is busy
    with something else slows both."""
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
