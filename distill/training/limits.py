"""What loader workers need of a machine: shared memory for the batches that wait, and open files to hand them over."""

import os
import re
import resource
import shutil
from pathlib import Path

from torch.multiprocessing import get_sharing_strategy

from embeddings_cache.shards import files_open_at_most
from embeddings_cache.system import processes_here
from students import InputError

SHARED_MEMORY = Path("/dev/shm")
AHEAD = 2
"""Batches that wait, a worker; PyTorch's `prefetch_factor`."""
IN_HAND = 2
"""Batches of a process that it trains on, and has just been given."""
TENSORS_OF_A_BATCH = 6
"""Besides its pictures: sizes, embeddings, prompts."""
FILES_OF_A_WORKER = 4
"""Pipes that lead to it."""
SPARE_FILES = 8
"""What it takes to hand a batch over: sockets, a shard that is opened before another is closed."""
LOADERS = 2
"""Training's, and while it waits, validation's."""
WITHOUT_WORKERS = "train.workers=0 reads in the training process"

OUT_OF_MEMORY = re.compile(r"shared memory|bus error|unable to (write to|mmap|resize)", re.IGNORECASE)
OUT_OF_FILES = re.compile(r"too many open files|ancdata|errno 24|EOFError", re.IGNORECASE)


def refuse_little_shared_memory(batch_bytes: int, workers: int, validation: int) -> None:
    """Raise `InputError` where the batches that wait will not fit: a worker would die of it, and say little.

    Docker gives 64 MB unless told otherwise; at 1024 px a single image takes 5 MB.

    Args:
        batch_bytes: of a batch of one process.
        workers: of each process.
        validation: batches of a process; those wait beside the ones for training.
    """
    if not SHARED_MEMORY.is_dir():  # macOS has it elsewhere, without a limit
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    at_once = AHEAD * workers + IN_HAND
    needed = batch_bytes * (at_once + min(validation, at_once)) * processes_here()
    if needed > free:
        raise InputError(
            f"train.workers={workers} needs {needed / 2**20:.1f} MiB of shared memory for batches that wait, and "
            f"{SHARED_MEMORY} has {free / 2**20:.1f} MiB: docker run --shm-size=8g gives more, {WITHOUT_WORKERS}"
        )


def refuse_few_files(batch: int, workers: int, shards: int) -> None:
    """Raise `InputError` where a worker may not open as many files as it has to hold.

    Args:
        batch: images of a batch of one process; a tensor is handed over as a file, on Linux.
        workers: of each process.
        shards: of the cache; a worker keeps some of them open.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    as_files = get_sharing_strategy() == "file_descriptor"
    handed_over = AHEAD * (batch + TENSORS_OF_A_BATCH) if as_files else 0
    pipes = LOADERS * FILES_OF_A_WORKER * workers
    own = handed_over + min(shards, files_open_at_most()) + SPARE_FILES
    needed = len(os.listdir("/dev/fd")) + pipes + own
    if needed > limit:
        raise InputError(
            f"train.workers={workers} at {batch} images a batch need {needed} open files, and this process may have "
            f"{limit}: ulimit -n 4096 gives more, {WITHOUT_WORKERS}"
        )


def limit_of_workers(error: Exception, workers: int) -> str:
    """What a worker met with, and what helps; "" where it is something else."""
    said = f"{type(error).__name__}: {error}"
    if OUT_OF_FILES.search(said):
        return (
            f"train.workers={workers} hand over more files than this system lets a process open: ulimit -n 4096 "
            f"gives more, {WITHOUT_WORKERS}"
        )
    if OUT_OF_MEMORY.search(said):
        return (
            f"train.workers={workers} ran out of shared memory: docker run --shm-size=8g gives more, {WITHOUT_WORKERS}"
        )
    return ""
