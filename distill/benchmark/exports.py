"""`benchmark.py students RUN`: the encoders of a run's export, and the latencies that are written there."""

from pathlib import Path
from typing import Any

from distill.export.latency import note_latencies
from distill.schema import FORMATS
from embeddings_cache.system import read_json, sole_user
from students import InputError


def is_run(name: str) -> bool:
    """Whether a name on the command line is a run directory's: a package for Core ML is a directory too."""
    return Path(name).is_dir() and Path(name).suffix != ".mlpackage"


def exported_encoders(run: str) -> list[str]:
    """Paths of the encoders in a run's `export/`.

    Raises:
        InputError: it has none.
    """
    directory = Path(run) / "export"
    manifest = directory / "manifest.json"
    names = read_json(manifest)["files"] if manifest.exists() else {}
    for_tensorrt = FORMATS["onnx_trt"]  # which no backend here is
    encoders = [name for name in names if "encoder" in name.lower() and Path(name).suffix and name not in for_tensorrt]
    found = [str(directory / name) for name in encoders if (directory / name).exists()]
    if not found:
        raise InputError(f"{run} has no exported encoder: python distill.py stage=export run_dir={run}")
    return found


def hand_over(names: list[str], content: dict[str, Any]) -> list[Path]:
    """Put the latencies of runs that were named into their exports' manifests and READMEs; returns the READMEs' paths.

    Args:
        names: what was asked for on the command line.
        content: of `benchmark.json`.

    Raises:
        InputError: another process works on the run, or its export is an earlier version's.
        OSError: it cannot be written to.
    """
    written = []
    for run in dict.fromkeys(map(Path, filter(is_run, names))):
        rows = [row for row in content["rows"] if Path(row["name"]).parent == run / "export" and "median_ms" in row]
        found: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            found.setdefault(Path(row["name"]).name, []).append(_latency(row, content["machine"]))
        if found:
            with sole_user(run):
                written.append(note_latencies(run / "export", found))
    return written


def _latency(row: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    on_gpu = row["backend"].endswith("-cuda")
    elsewhere = on_gpu or row["backend"].startswith("coreml")
    return {
        "backend": row["backend"],
        "ms": row["median_ms"],
        "p10_ms": row["p10_ms"],
        "p90_ms": row["p90_ms"],
        "runs": sum(map(len, row["samples_ms"])),
        "threads": None if elsewhere else machine["threads"],
        "machine": machine["gpu"] if on_gpu else machine["cpu"],
        "date": machine["date"],
        "by": "benchmark.py students",
    }
