"""The machine that something is measured on: what it is, what it can do at best, and what a process of its takes."""

import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from platform import platform, python_version
from typing import Any

import torch

from distill.benchmark.timing import interleave, synchronize, timed
from embeddings_cache.system import available_cores, cpu_name, installed_versions
from students import InputError

MATRIX = 8192
"""Side of the square bfloat16 matrices whose product says what a GPU can do."""

TOOLS = ("sam-distill", "torch", "timm", "segment-anything-py", "onnxruntime", "openvino", "coremltools", "numpy")


@dataclass(frozen=True)
class Cost:
    """What one call took in a process of its own: seconds, and bytes held at most, in all and more than before it."""

    seconds: float
    peak_bytes: int
    added_bytes: int


def cost_alone(prepare: Callable[[], Callable[[], object]]) -> Cost:
    """Measure one call in a new process, so that nothing else has touched its memory.

    Args:
        prepare: called there (so it must be picklable); returns what is to be measured.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(prepare, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _measure(prepare: Callable[[], Callable[[], object]], sender: Connection) -> None:
    measured = prepare()
    before = peak_bytes(forget=True)
    started = time.perf_counter()
    kept = measured()
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    sender.send(Cost(seconds, peak, peak - before))
    del kept


def peak_bytes(forget: bool = False) -> int:
    """This process's largest resident memory so far; on Linux it can be forgotten first, elsewhere it only grows."""
    status = Path("/proc/self/status")
    if status.exists():
        if forget:
            with suppress(OSError):  # a sandbox
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gpu_peak(measured: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call adds at most to what the GPU holds before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    measured()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def matrix_product_rate(device: torch.device) -> float:
    """Floating-point operations a second of one large bfloat16 matrix product on this very device."""
    left, right = (torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = timed(lambda: [left @ right for _ in range(10)], device)
    return 10 * 2 * MATRIX**3 / interleave({"product": product}, 5, "product")["product"].median


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` → a device.

    Raises:
        InputError: none of these, or there is no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device={name} is not known; known: auto, cpu, cuda")
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise InputError("device=cuda: this PyTorch finds no GPU")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")


def machine(device: torch.device, threads: int | None = None) -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = cpu_name()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu if gpu and device.type == "cuda" else cpu,
        "cpu": cpu,
        "gpu": gpu,
        "cores": available_cores(),
        "threads": threads or torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "torch": torch.__version__,
        "versions": installed_versions(TOOLS),
        "python": python_version(),
        "system": platform(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _memory_bytes() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
