"""What becomes of masks where a picture is resized otherwise than by Pillow, by which students are trained:
`python tests/helpers/resizing_ways.py EXPORT PHOTO...`

Each way makes the encoder's input of each photo; the same encoder and decoder make masks of it for a few prompts, which
are compared with those of Pillow's input. Needs Node, npm and Chromium.
"""

import argparse
import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from browser import Browser, browsing, served
from distill.clients.segmenter import Segmenter
from distill.evaluate.ious import mask_iou
from distill.export.onnx.encoder import onnx_encode
from embeddings_cache.images.decoding import decode_image
from embeddings_cache.images.preprocessing import resize_longest_side
from npm import npm_install
from support import ROOT

PROMPTS = ((0.5, 0.5), (0.3, 0.6), (0.25, 0.25, 0.75, 0.75))
"""Two points and a box, in shares of the picture."""

CANVAS = {"Chromium, canvas, low": "low", "Chromium, canvas, high": "high"}
SHARP = {
    "sharp, as it comes (lanczos3)": "lanczos3",
    'sharp, kernel: "linear"': "linear",
    "resize.mjs": None,
}
"""Ways in a browser, by `imageSmoothingQuality`, and in Node, by sharp's kernel."""

IN_NODE = """
import { readFileSync, writeFileSync } from "node:fs";
import sharp from "sharp";
import { Resizer } from "./resize.mjs";
for (const [number, { width, height, toWidth, toHeight }] of JSON.parse(readFileSync("sizes.json")).entries()) {
  const pixels = readFileSync(`${number}.rgb`);
  for (const [way, kernel] of JSON.parse(readFileSync("ways.json")).entries()) {
    let small;
    if (kernel) {
      const raw = { width, height, channels: 3 };
      small = await sharp(pixels, { raw }).resize(toWidth, toHeight, { fit: "fill", kernel }).raw().toBuffer();
    } else {
      const resizer = new Resizer(width, height, toWidth, toHeight);
      resizer.push(pixels, 3);
      small = resizer.finish();
    }
    writeFileSync(`${number}.${way}`, small);
  }
}
"""

IN_BROWSER = """(async () => {
  const bitmap = await createImageBitmap(await (await fetch("NUMBER.png")).blob(), { colorSpaceConversion: "none" });
  const canvas = Object.assign(document.createElement("canvas"), { width: WIDTH, height: HEIGHT });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = QUALITY;
  context.drawImage(bitmap, 0, 0, WIDTH, HEIGHT);
  const { data } = context.getImageData(0, 0, WIDTH, HEIGHT);
  let text = "";
  for (let i = 0; i < data.length; i += 8192) text += String.fromCharCode(...data.subarray(i, i + 8192));
  return btoa(text);
})()"""


def main() -> None:
    """Print a row for each way: how far levels are off, and the median, 5th percentile and worst IoU of masks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("photos", nargs="+", type=Path)
    given = parser.parse_args()
    segmenter, encode = Segmenter(given.export), onnx_encode(given.export / "encoder.onnx")
    photos = [decode_image(photo.read_bytes()) for photo in given.photos]
    references = [resize_longest_side(photo, segmenter.input_size) for photo in photos]
    ious: dict[str, list[float]] = {}
    off: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        for number, way, small in resized_otherwise(Path(place), photos, references):
            reference, size = references[number], (photos[number].shape[1], photos[number].shape[0])
            off.setdefault(way, []).append(float(np.abs(small.astype(int) - reference).mean()))
            embedding, expected = encode(small), encode(reference)
            for prompt in PROMPTS:
                wanted = mask_of(segmenter, expected, size, prompt)
                if wanted.any():
                    ious.setdefault(way, []).append(mask_iou(mask_of(segmenter, embedding, size, prompt), wanted))
    print("| resized by | levels off, mean | median IoU | 5th percentile | worst |\n| --- | --- | --- | --- | --- |")
    for way, found in ious.items():
        low, middle = np.percentile(found, [5, 50])
        print(f"| {way} | {np.mean(off[way]):.2f} | {middle:.4f} | {low:.3f} | {min(found):.3f} |")
    print(f"\n{len(photos)} pictures, {len(next(iter(ious.values())))} masks that are not empty")


def mask_of(
    segmenter: Segmenter, embedding: np.ndarray, size: tuple[int, int], prompt: tuple[float, ...]
) -> np.ndarray:
    """Boolean (H, W) of a point or box in shares of a picture of some width and height."""
    placed = [share * size[axis % 2] for axis, share in enumerate(prompt)]
    if len(placed) == 2:
        return segmenter.segment(embedding, size, [placed], [1]).mask
    return segmenter.segment(embedding, size, box=placed).mask


def resized_otherwise(
    folder: Path, photos: list[np.ndarray], references: list[np.ndarray]
) -> Iterator[tuple[int, str, np.ndarray]]:
    """The number of a photo, a way, and what that makes of it: RGB uint8 of the reference's shape."""
    sizes = [
        {"width": photo.shape[1], "height": photo.shape[0], "toWidth": small.shape[1], "toHeight": small.shape[0]}
        for photo, small in zip(photos, references, strict=True)
    ]
    for number, photo in enumerate(photos):
        (folder / f"{number}.rgb").write_bytes(photo.tobytes())
        Image.fromarray(photo).save(folder / f"{number}.png", compress_level=1)
    (folder / "sizes.json").write_text(json.dumps(sizes))
    (folder / "ways.json").write_text(json.dumps(list(SHARP.values())))
    (folder / "run.mjs").write_text(IN_NODE)
    (folder / "index.html").write_text("<!doctype html><title>ways</title>")
    shutil.copy(ROOT / "distill" / "clients" / "web" / "resize.mjs", folder)
    wanted = json.loads((ROOT / "distill" / "clients" / "programs" / "package.json").read_text())["dependencies"]
    npm_install(folder, f"sharp@{wanted['sharp']}")
    subprocess.run(["node", "run.mjs"], cwd=folder, check=True)
    with served(folder) as server, browsing(folder / "profile") as browser:
        browser.open(server.address)
        for number, reference in enumerate(references):
            for way, quality in CANVAS.items():
                yield number, way, drawn(browser, number, reference.shape, quality)
            for place, way in enumerate(SHARP):
                yield number, way, np.fromfile(folder / f"{number}.{place}", np.uint8).reshape(reference.shape)


def drawn(browser: Browser, number: int, shape: tuple[int, ...], quality: str) -> np.ndarray:
    """What a canvas makes of a photo: RGB uint8 of some shape."""
    words = {"NUMBER": number, "WIDTH": shape[1], "HEIGHT": shape[0], "QUALITY": json.dumps(quality)}
    script = IN_BROWSER
    for word, value in words.items():
        script = script.replace(word, str(value))
    data = np.frombuffer(base64.b64decode(browser.evaluate(script)), np.uint8)
    return data.reshape(*shape[:2], 4)[..., :3]


if __name__ == "__main__":
    main()
