"""One look for every progress bar."""

import sys
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm


def progress_bar(accelerator: Accelerator, stage: str, unit: str, **options: Any) -> tqdm:
    """A bar with rate and time left, on the main process only; with several processes it counts that one's share."""
    return bar(desc=stage, unit=f" {unit}", disable=not accelerator.is_main_process, **options)


def bar(items: Any = None, **options: Any) -> tqdm:
    """tqdm; in a log file a line every ten seconds."""
    return tqdm(items, mininterval=0.1 if sys.stderr.isatty() else 10.0, dynamic_ncols=True, **options)
