"""What a machine calls its processor."""

import platform
import subprocess
import sys
from pathlib import Path


def cpu_name() -> str:
    """The processor's name as the system has it; its kind where it has none."""
    return _by_system() or platform.processor() or platform.machine()


def _by_system() -> str | None:
    if sys.platform == "darwin":
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        return asked.stdout.strip() or None
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return None
    lines = (line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name"))
    return next((line.partition(":")[2].strip() for line in lines), None)
