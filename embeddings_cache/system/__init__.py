"""Machinery that knows nothing of pictures or caches: whole files, threads, processes, signals, progress."""

from embeddings_cache.system.files import (
    PASSING,
    TEMPORARY,
    publish,
    read_json,
    sha256,
    sole_user,
    whole_file,
    write_json,
)
from embeddings_cache.system.hashing import stable_hash
from embeddings_cache.system.overlap import available_cores, iterate_ahead, map_ahead, processes_here
from embeddings_cache.system.processor import cpu_name
from embeddings_cache.system.progress import bar, progress_bar
from embeddings_cache.system.stopping import Stopped, StopRequest, stop_on_request
from embeddings_cache.system.versions import installed_versions
from embeddings_cache.system.workers import Workers

__all__ = [
    "PASSING",
    "TEMPORARY",
    "StopRequest",
    "Stopped",
    "Workers",
    "available_cores",
    "bar",
    "cpu_name",
    "installed_versions",
    "iterate_ahead",
    "map_ahead",
    "processes_here",
    "progress_bar",
    "publish",
    "read_json",
    "sha256",
    "sole_user",
    "stable_hash",
    "stop_on_request",
    "whole_file",
    "write_json",
]
