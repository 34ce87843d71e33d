"""Whether the files of this folder are one model, and one that CVAT can use: `python check.py [DECODER]`.

DECODER is a decoder elsewhere to check against the encoder here, such as the one that CVAT's pages hand to browsers.
Prints a line; exits with 1 and the reason where something does not fit.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from segmenter import FINGERPRINT, Segmenter

FOLDER = Path(__file__).resolve().parent
EMBEDDING = [256, 64, 64]
"""The one shape that CVAT's pages take: channels, rows, columns."""

OUTPUTS = {"masks", "low_res_masks", "xtl", "ytl", "xbr", "ybr"}
"""What they read of a decoder's answer."""


def check(encoder_file: Path, decoder_file: Path) -> str:
    """A line on what was found.

    Raises:
        ValueError: what does not fit.
    """
    encoder, decoder = open_file(encoder_file), open_file(decoder_file)
    made, taken = encoder.get_outputs()[0].shape, decoder.get_inputs()[0].shape
    if made[1:] != EMBEDDING:
        raise ValueError(f"{encoder_file} makes embeddings of {made}, CVAT takes (1, 256, 64, 64)")
    if taken[1:] != EMBEDDING:
        raise ValueError(f"{decoder_file} takes embeddings of {taken}, CVAT gives (1, 256, 64, 64)")
    if lacking := OUTPUTS - {output.name for output in decoder.get_outputs()}:
        raise ValueError(f"{decoder_file} has no {', '.join(sorted(lacking))}: CVAT needs a decoder that crops")
    ours, theirs = (fingerprint(session) for session in (encoder, decoder))
    if ours is None or theirs is None:
        unknown = encoder_file if ours is None else decoder_file
        raise ValueError(f"{unknown} has no fingerprint: it was not made with the other file")
    if ours != theirs:
        raise ValueError(
            f"{encoder_file} is of model {ours}, {decoder_file} of {theirs}: they make wrong masks together"
        )
    segmenter = Segmenter(encoder_file.parent, decoder=decoder_file)
    return f"encoder and decoder are of one model, {ours}, in CVAT's shape (1, 256, 64, 64); {try_out(segmenter)}"


def try_out(segmenter: Segmenter) -> str:
    """What comes of a generated picture with a disc in its middle, and a click there.

    Raises:
        ValueError: numbers that are not finite.
    """
    started = time.perf_counter()
    y, x = np.mgrid[:480, :640]
    inside = (x - 320) ** 2 + (y - 240) ** 2 < 150**2
    picture = np.where(inside[..., None], (220, 60, 40), (90, 120, 160)).astype(np.uint8)
    embedding = segmenter.embed(Image.fromarray(picture))
    answer = segmenter.segment(embedding, (640, 480), [(320, 240)], [1])
    if not (np.isfinite(embedding).all() and np.isfinite(answer.low_res).all()):
        raise ValueError("a picture came out as numbers that are not finite")
    took = time.perf_counter() - started
    return (
        f"a picture of 640×480 px took {took:.1f} s: {answer.mask.sum()} px, predicted IoU {answer.predicted_iou:.2f}"
    )


def open_file(path: Path) -> onnxruntime.InferenceSession:
    """An ONNX file, opened on the CPU.

    Raises:
        ValueError: it is not there, or is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # of ONNX Runtime's own kinds, one for each trouble
        raise ValueError(f"{path} cannot be opened: {error}") from error


def fingerprint(session: onnxruntime.InferenceSession) -> str | None:
    """Which model a file is of, None where it does not say."""
    found: str | None = session.get_modelmeta().custom_metadata_map.get(FINGERPRINT)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Do encoder and decoder belong together, and can CVAT use them?")
    parser.add_argument("decoder", nargs="?", type=Path, default=FOLDER / "decoder.onnx", help="default: the one here")
    try:
        print(check(FOLDER / "encoder.onnx", parser.parse_args().decoder))
    except (ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from error
