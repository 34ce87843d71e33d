"""What loader workers need of a machine: shared memory for the batches that wait, and open files to hand them over."""

import os
import re
import resource
import shutil
from pathlib import Path

from embeddings_cache.shards import files_open_at_most
from embeddings_cache.system import processes_here
from students import InputError

SHARED_MEMORY = Path("/dev/shm")
BATCHES_AHEAD = 2
"""A worker; PyTorch's `prefetch_factor`."""
TENSORS_OF_A_BATCH = 6
"""Besides its pictures: sizes, embeddings, prompts."""
FILES_OF_A_WORKER = 4
"""Pipes that lead to it."""
WITHOUT_WORKERS = "train.workers=0 reads in the training process"

OUT_OF_MEMORY = re.compile(r"shared memory|bus error|unable to (write to|mmap|resize)", re.IGNORECASE)
OUT_OF_FILES = re.compile(r"too many open files|ancdata|errno 24|EOFError", re.IGNORECASE)


def refuse_little_shared_memory(batch_bytes: int, workers: int) -> None:
    """Raise `InputError` where the batches that wait will not fit: a worker would die of it, and say little.

    Docker gives 64 MB unless told otherwise; at 1024 px a single image takes 4.5 MB.

    Args:
        batch_bytes: of a batch of one process.
        workers: of each process.
    """
    if not SHARED_MEMORY.is_dir():  # macOS has it elsewhere, without a limit
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    needed = batch_bytes * BATCHES_AHEAD * workers * processes_here()
    if needed > free:
        raise InputError(
            f"train.workers={workers} needs {needed / 2**20:.0f} MiB of shared memory for batches that wait, and "
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB: docker run --shm-size=8g gives more, {WITHOUT_WORKERS}"
        )


def refuse_few_files(batch: int, workers: int, shards: int) -> None:
    """Raise `InputError` where a worker may not open as many files as it has to hold: it loses a batch then without a
    word, and the training process waits for it for ever.

    Args:
        batch: images of a batch of one process; a tensor is handed over as a file.
        workers: of each process.
        shards: of the cache; a worker keeps some of them open.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    handed_over = BATCHES_AHEAD * (batch + TENSORS_OF_A_BATCH)
    needed = len(os.listdir("/dev/fd")) + FILES_OF_A_WORKER * workers + handed_over + min(shards, files_open_at_most())
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
