"""Core ML conversions in a process of their own: each keeps one core busy with Python, while ONNX files are made and
compared."""

from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from distill.export.coreml.conversion import compress, convert_decoder, convert_encoder
from distill.export.coreml.package import require_coremltools, require_writer
from distill.export.coreml.weights import DECODER, ENCODER, FULL, PACKAGES
from distill.export.encoder import RgbEncoder
from distill.export.subject import load_subject
from distill.recipe import Recipe
from students import InputError


def source_of(name: str) -> str:
    """The package that a compressed one is made of; one for iOS 18 is not handed over itself."""
    whole = ENCODER if name.startswith("Encoder") else DECODER
    return f"iOS18{whole}" if PACKAGES[name].grouped else whole


class Conversions:
    """Packages that another process is making, in the order in which they were asked for.

    Args:
        futures: by name of the package; done when it lies in `folder`.
    """

    def __init__(self, folder: Path, futures: dict[str, Future[None]]) -> None:
        self.folder, self.futures = folder, futures

    def model(self, name: str) -> Any:
        """Wait for a package; a `coremltools` model, not yet described or compared.

        Raises:
            InputError: coremltools cannot write here, or does not know something in it, or the process was killed.
        """
        require_writer()
        try:
            if PACKAGES[name].bits:
                self.futures[source_of(name)].result()  # without which there is nothing to compress
            self.futures[name].result()
        except BrokenProcessPool:
            raise InputError("its conversion was killed, most likely for want of memory") from None
        return _load(self.folder / name)


@contextmanager
def conversions(recipe: Recipe, names: list[str]) -> Iterator[Conversions]:
    """Begin to make these packages of the recipe's student; nothing where there are none."""
    asked = [name for name in PACKAGES if name in names]
    if not asked or not _can_write():
        yield Conversions(Path(), {})  # whose models say why they cannot be had
        return
    order = dict.fromkeys(each for name in asked for each in (source_of(name), name))
    with TemporaryDirectory(prefix="coreml-") as scratch, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        folder = Path(scratch)
        try:
            yield Conversions(folder, {name: pool.submit(_make, recipe, folder, name) for name in order})
        finally:
            pool.shutdown(cancel_futures=True)


def _can_write() -> bool:
    try:
        require_writer()
    except InputError:
        return False
    return True


def _make(recipe: Recipe, folder: Path, name: str) -> None:
    torch.set_num_threads(1)  # the other cores are busy
    weights = PACKAGES.get(name, FULL)
    if weights.bits:
        model = compress(_load(folder / source_of(name)), weights)
    else:
        subject = load_subject(recipe)
        newest = name.startswith("iOS18")
        if name.endswith(ENCODER):
            model = convert_encoder(RgbEncoder(subject.encoder, eight_bit=True).eval(), newest)
        else:
            assert subject.sam is not None
            model = convert_decoder(subject.sam, newest)
    model.save(str(folder / name))


def _load(package: Path) -> Any:
    return require_coremltools().models.MLModel(str(package), skip_model_load=True)
