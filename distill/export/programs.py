"""Programs that lie beside an encoder and `decoder.onnx`, and end in a mask: for Python, Node and browsers."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill.clients import client_files, write_client
from distill.export.files import digest, remove, size
from embeddings_cache.system import TEMPORARY, publish

ENCODERS = ("encoder.onnx", "encoder_fp16.onnx", "encoder_int8.onnx")
"""Which they take: the first that is there, unless they are told of another."""


def encoder_of_programs(made: Iterable[str]) -> str | None:
    """The encoder that programs take by themselves; None where they lack one, or the decoder."""
    there = set(made)
    return next((name for name in ENCODERS if name in there), None) if "decoder.onnx" in there else None


def write_programs(directory: Path, made: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Write the programs into an export, each whole or not at all, and leave none there where they would not run;
    returns what the manifest says of them."""
    encoder = encoder_of_programs(made)
    if encoder is None:
        for name in client_files("programs"):
            remove(directory / name)
        return {}
    written = {}
    scratch = directory / f"{TEMPORARY}programs"
    remove(scratch)
    scratch.mkdir(parents=True)
    try:
        write_client("programs", scratch, {})
        for path in sorted(scratch.iterdir()):
            path.write_text(path.read_text(encoding="utf-8").replace("encoder.onnx", encoder), encoding="utf-8")
            publish(path, directory / path.name)
            written[path.name] = {"sha256": digest(directory / path.name), "bytes": size(directory / path.name)}
    finally:
        shutil.rmtree(scratch)
    return written
