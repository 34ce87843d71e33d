"""What the files of an export cost: measured in short where it ends, and in full by `benchmark.py students RUN`."""

import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime

from distill.export.handover import write_readme
from distill.export.onnx import open_session
from embeddings_cache.system import available_cores, cpu_name, read_json, write_json
from students import InputError

TIMED = ("encoder.onnx", "encoder_int8.onnx", "decoder.onnx")
"""Files for processors: float16 is slower there than float32, and says nothing."""

TURNS, SECONDS = 10, 3.0
"""Runs of each file at most, and in how many seconds; there are three at least."""

SHORT = "stage=export"
"""How a latency was measured, where it was not by the benchmark."""


def time_files(directory: Path, files: dict[str, dict[str, Any]]) -> None:
    """Put `latency` into what a manifest says of ONNX files for processors, where there is none: the median of some
    runs of ONNX Runtime on all cores, in turns, so that a machine that is busy slows all of them."""
    threads = available_cores()
    untimed = [name for name in TIMED if name in files and "latency" not in files[name]]
    sessions = {name: open_session(directory / name, intra_op_num_threads=threads) for name in untimed}
    feeds = {name: _example(session) for name, session in sessions.items()}
    for name, session in sessions.items():
        session.run(None, feeds[name])
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    until = time.perf_counter() + SECONDS * len(sessions)
    for turn in range(TURNS):
        if turn >= 3 and time.perf_counter() > until:
            break
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run(None, feeds[name])
            seconds[name].append(time.perf_counter() - began)
    for name, taken in seconds.items():
        files[name]["latency"] = [
            {
                "backend": "onnxruntime",
                "ms": round(1000 * median(taken), 2),
                "runs": len(taken),
                "threads": threads,
                "machine": cpu_name(),
                "date": time.strftime("%Y-%m-%d"),
                "by": SHORT,
            }
        ]


def note_latencies(directory: Path, latencies: dict[str, list[dict[str, Any]]]) -> Path:
    """Put what a benchmark came to into an export's manifest and README, in the place of what stood there; returns the
    README's path.

    Args:
        directory: `export/`.
        latencies: by the names of files, of each backend one: as `time_files` has it, and `p10_ms` and `p90_ms`.

    Raises:
        InputError: an earlier version made it.
    """
    manifest = read_json(directory / "manifest.json")
    if "card" not in manifest:
        raise InputError(f"{directory} is an earlier version's: stage=export run_dir={directory.parent} renews it")
    for name in manifest["files"].keys() & latencies.keys():
        manifest["files"][name]["latency"] = latencies[name]
    write_readme(directory / "README.md", manifest)
    write_json(directory / "manifest.json", manifest)
    return directory / "README.md"


def _example(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """Something to run on: an image, or an embedding and a click in the middle of a square picture."""
    shapes = {entry.name: [s if isinstance(s, int) else 1 for s in entry.shape] for entry in session.get_inputs()}
    draws = np.random.default_rng(0)
    feeds = {name: draws.uniform(0, 255, shape).astype(np.float32) for name, shape in shapes.items()}
    if "mask_input" in feeds:
        side = 4 * shapes["mask_input"][-1]
        feeds["image_embeddings"] = draws.normal(0, 1, shapes["image_embeddings"]).astype(np.float32)
        feeds["point_coords"] = np.array([[[side / 2, side / 2], [0, 0]]], np.float32)
        feeds["point_labels"] = np.array([[1, -1]], np.float32)
        feeds["has_mask_input"] = np.zeros(1, np.float32)
        feeds["orig_im_size"] = np.array([side, side], np.float32)
    return feeds
