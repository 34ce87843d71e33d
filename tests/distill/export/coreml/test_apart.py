import json
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from distill.export.coreml.apart import Conversions, conversions
from distill.export.coreml.weights import DECODER, ENCODER
from students import InputError
from support import TINY, Cli, places


def failed(error: BaseException) -> Future[None]:
    future: Future[None] = Future()
    future.set_exception(error)
    return future


def test_a_conversion_that_was_killed_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its conversion was killed, most likely for want of memory"):
        Conversions(tmp_path, {DECODER: failed(BrokenProcessPool())}).model(DECODER)


def test_what_cannot_be_converted_cannot_be_compressed_and_says_why(tmp_path: Path) -> None:
    futures = {ENCODER: failed(InputError("no such operator")), "Encoder_8bit.mlpackage": failed(FileNotFoundError())}
    for name in futures:
        with pytest.raises(InputError, match="no such operator"):
            Conversions(tmp_path, futures).model(name)


def test_nothing_is_started_where_there_is_nothing_to_convert() -> None:
    with conversions(None, ["encoder.onnx", "decoder.onnx"]) as none:
        assert none.futures == {}


@pytest.mark.slow
def test_compressed_weights_alone(finished_run: Path, tmp_path: Path, cli: Cli) -> None:
    """The package that they are made of is not handed over."""
    checkpoint = finished_run / "run" / "student.safetensors"
    result = cli(
        *TINY, *places(tmp_path, "gone.tar"), "stage=export", f"checkpoint={checkpoint}", "export.formats=coreml_8bit"
    )
    assert result.returncode == 0, result.stderr
    directory = tmp_path / "run" / "export"
    assert sorted(path.name for path in directory.iterdir()) == [
        "README.md",
        "RepViTM09Encoder_8bit.mlpackage",
        "manifest.json",
    ]
    (entry,) = json.loads((directory / "manifest.json").read_text())["files"].values()
    assert entry["precision"] == "float16, weights in 8 bits"
    assert entry["parity"]["mask_miou"] >= 0.98
