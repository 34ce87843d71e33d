"""Timing that can be trusted on a machine whose speed drifts."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from platform import platform, processor
from typing import Any

import torch
from tqdm import tqdm

from students import InputError


@dataclass(frozen=True)
class Times:
    """Seconds of each round, of one subject."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_json(self, parts: int = 1) -> dict[str, float]:
        """Median and spread in milliseconds, as the report shows them, of one of so many equal parts of a round."""
        ordered = sorted(seconds / parts for seconds in self.seconds)
        last = len(ordered) - 1
        return {
            "median_ms": round(1e3 * self.median / parts, 3),
            "p10_ms": round(1e3 * ordered[round(0.1 * last)], 3),
            "p90_ms": round(1e3 * ordered[round(0.9 * last)], 3),
        }


def interleave(subjects: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Times]:
    """Time each subject once a round, in an order that turns from round to round, after one round to warm up.

    So a machine that becomes slower or faster meanwhile is slower or faster for all of them, and a ratio of medians
    means something.
    """
    names = list(subjects)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=(rounds + 1) * len(names), unit=" runs", leave=False) as progress:
        for number in range(rounds + 1):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                progress.set_description(name)
                synchronize(device)
                started = time.perf_counter()
                subjects[name]()
                synchronize(device)
                if number:
                    seconds[name].append(time.perf_counter() - started)
                progress.update()
    return {name: Times(values) for name, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to be done; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    before = _peak_bytes(forget=True)
    started = time.perf_counter()
    kept = measured()
    seconds = time.perf_counter() - started
    peak = _peak_bytes()
    sender.send(Cost(seconds, peak, peak - before))
    del kept


def _peak_bytes(forget: bool = False) -> int:
    """This process's largest resident memory so far; on Linux it can be forgotten first, elsewhere it only grows."""
    status = Path("/proc/self/status")
    if status.exists():
        if forget:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


MATRIX = 8192
"""Side of the square bfloat16 matrices whose product says what a GPU can do."""


def matrix_product_rate(device: torch.device) -> float:
    """Floating-point operations a second of one large bfloat16 matrix product on this very device."""
    left, right = (torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = interleave({"product": lambda: [left @ right for _ in range(10)]}, 5, device)["product"]
    return 10 * 2 * MATRIX**3 / product.median


def gpu_peak(measured: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call adds at most to what the GPU holds before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    measured()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


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


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name() or processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "system": platform(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str | None:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return None
    lines = (line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name"))
    return next((line.partition(":")[2].strip() for line in lines), None)
