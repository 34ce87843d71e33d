"""What is at some pixels of a photograph, as a mask.

python segment.py photo.jpg 320,240                          what is there
python segment.py photo.jpg 320,240 410,200 --off 90,300     all of that, and not this
python segment.py photo.jpg --box 100,80,420,400             what the box is around

A program of one's own imports `Segmenter` from `segmenter.py`, as this one does: `look` at a picture once, `segment` at
every click.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image
from segmenter import Mask, Segmenter

HERE = Path(__file__).parent


def main() -> None:
    """Read the command line, write the mask, say what came out; an error is a line, and the exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path, help="JPEG, PNG or whatever else Pillow reads")
    parser.add_argument("on", nargs="*", type=point, metavar="X,Y", help="points on the object, in pixels of the photo")
    parser.add_argument("--off", action="append", default=[], type=point, metavar="X,Y", help="a point beside it")
    parser.add_argument("--box", type=box, metavar="X0,Y0,X1,Y1", help="around it")
    parser.add_argument("--refine", action="store_true", help="one point after the other, each with the mask before")
    parser.add_argument("--longest", type=int, metavar="PIXELS", help="of the mask's sides, for a screen")
    parser.add_argument("--encoder", type=Path, default=HERE / "encoder.onnx", help="another of the encoders")
    parser.add_argument(
        "--out", type=Path, default=Path("mask.png"), help="a PNG, 255 on the object and 0 elsewhere; default: mask.png"
    )
    asked = parser.parse_intermixed_args()
    try:
        found = answer(asked)
        Image.fromarray(found.mask).convert("L").save(asked.out, format="PNG")
    except Exception as error:  # ONNX Runtime's have no common kind
        print(f"segment.py: {(str(error) or type(error).__name__).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    print(f"{asked.out}: {found.mask.sum()} pixels, predicted IoU {found.predicted_iou:.3f}")


def answer(asked: argparse.Namespace) -> Mask:
    """The mask that was asked for.

    Raises:
        BadPicture: the photo is none, or cannot be resized.
        ValueError: nothing was asked for, or something outside of the photo.
        OSError: there is no such file.
    """
    for file in (asked.photo, asked.encoder, HERE / "decoder.onnx"):
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file")
    if asked.longest is not None and asked.longest < 1:
        raise ValueError(f"--longest is a number of pixels, not {asked.longest}")
    if asked.box and asked.box[:2] == asked.box[2:]:
        raise ValueError(f"the corners of a box are one point, {asked.box[0]:g},{asked.box[1]:g}")
    segmenter = Segmenter(HERE, encoder=asked.encoder)
    embedding, size = segmenter.look(asked.photo.read_bytes())  # once a picture
    points, labels = [*asked.on, *asked.off], [1] * len(asked.on) + [0] * len(asked.off)
    for x, y in [*points, *([asked.box[:2], asked.box[2:]] if asked.box else [])]:
        if not (0 <= x <= size[0] and 0 <= y <= size[1]):
            raise ValueError(f"{x:g},{y:g} lies outside of the photo, which has {size[0]}×{size[1]} pixels")
    scale = asked.longest / max(size) if asked.longest else 1
    width, height = (max(1, int(side * scale + 0.5)) for side in size)
    earlier = None
    for count in range(1, len(points)) if asked.refine else ():
        earlier = segmenter.segment(embedding, size, points[:count], labels[:count], asked.box, earlier).low_res
    return segmenter.segment(embedding, size, points, labels, asked.box, earlier, (width, height))


def point(text: str) -> list[float]:
    """`"320,240"` → `[320.0, 240.0]`."""
    x, y = (float(number) for number in text.split(","))
    return [x, y]


def box(text: str) -> list[float]:
    """`"100,80,420,400"` → its corners, the upper left one first, whichever way it was drawn."""
    x0, y0, x1, y1 = (float(number) for number in text.split(","))
    return [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]


if __name__ == "__main__":
    main()
