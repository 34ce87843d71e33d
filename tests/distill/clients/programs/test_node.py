"""`segment.mjs`: what it makes of a picture's file is what `SamPredictor` makes of the pixels that Python reads."""

import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segment_anything import SamPredictor

from distill.evaluate.ious import mask_iou
from embeddings_cache.images.decoding import decode_image
from npm import needs_node
from programs import (
    block,
    check_masks,
    check_sizes,
    expect,
    expect_all,
    in_node,
    kinds,
    node,
    picture,
    pictures,
    refused,
)


@pytest.mark.slow
@needs_node
def test_node_reads_the_pixels_that_python_reads(folder: Path, tmp_path: Path) -> None:
    script = """
    import sharp from "sharp";
    import { readPixels } from "./pixels_node.mjs";
    const sizes = [];
    for (const file of asked) {
      const { width, height, data } = await readPixels(sharp, file);
      writeFileSync(`${file}.rgb`, data);
      sizes.push([height, width]);
    }
    answer(sizes);"""
    files = kinds()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    sizes = in_node(folder, script, [str(tmp_path / name) for name in files])
    for (name, content), size in zip(files.items(), sizes, strict=True):
        expected = decode_image(content)
        assert tuple(size) == expected.shape[:2], name
        found = np.fromfile(tmp_path / f"{name}.rgb", np.uint8).reshape(expected.shape)
        np.testing.assert_array_equal(found, expected, name)


@pytest.mark.slow
@needs_node
@pytest.mark.parametrize("name", list(pictures()))
def test_node_makes_the_predictors_masks(folder: Path, predictor: SamPredictor, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pictures()[name])
    check_masks(partial(node, folder, "segment.mjs"), predictor, tmp_path / name)


@pytest.mark.slow
@needs_node
def test_a_mask_for_a_screen_is_the_same_mask(folder: Path, predictor: SamPredictor, tmp_path: Path) -> None:
    check_sizes(partial(node, folder, "segment.mjs"), predictor, tmp_path)


@pytest.mark.slow
@needs_node
def test_files_that_do_not_belong_together_are_one_line(folder: Path, tmp_path: Path) -> None:
    photo = tmp_path / "portrait.png"
    photo.write_bytes(pictures()[photo.name])
    (tmp_path / "words.jpg").write_text("hello")
    Image.fromarray(np.full((30, 40), 70_000, np.int32)).save(tmp_path / "32_bits.tif")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:3000])
    for arguments, reason in {
        (str(photo), "60,190"): None,  # the lower right corner is still inside
        (str(photo), "61,3"): "61,3 lies outside of the photo, which has 60×190 pixels",
        (str(photo), "--box", "-1,0,9,9"): "Option '--box' argument is ambiguous.",
        (str(photo), "--box=-1,0,9,9"): "-1,0 lies outside of the photo",
        (str(photo), "--box", "5,5,5,5"): "The corners of a box are one point, 5,5.",
        (str(tmp_path / "words.jpg"), "1,1"): "words.jpg is not a picture that can be read",
        (str(tmp_path / "cut.png"), "1,1"): "cut.png is not a picture that can be read",
        (str(tmp_path / "32_bits.tif"), "1,1"): "32_bits.tif is not a picture that can be read: it has numbers of",
        (str(photo), "1,1", "--encoder", "decoder.onnx"): "The model has no image",
        (str(photo), "1,1", "--encoder", "package.json"): "package.json",
        (str(photo), "1,1", "--out", str(tmp_path / "gone" / "mask.png")): "no such file or directory",
    }.items():
        if reason is None:
            assert node(folder, "segment.mjs", *arguments, "--out", tmp_path / "found.png").returncode == 0
        else:
            refused(folder, arguments, reason)
    script = """
    import ort from "onnxruntime-node";
    import { Segmenter } from "./segmenter.mjs";
    const said = [];
    const refuse = async (work) => said.push(await work().then(() => null, (error) => error.message));
    await refuse(() => Segmenter.load(ort, "encoder.onnx", "decoder_multimask.onnx"));
    const segmenter = await Segmenter.load(ort, "encoder.onnx", "decoder.onnx");
    await refuse(() => segmenter.embed({ data: new Uint8Array(10), width: 2, height: 2 }));
    await refuse(() => segmenter.embed({ data: new Uint8Array(9000), width: 3000, height: 1 }));
    const picture = await segmenter.embed({ data: new Uint8Array(60 * 40 * 3).fill(99), width: 60, height: 40 });
    const points = [[5, 5, 1]];
    await refuse(() => segmenter.mask(picture));
    await refuse(() => segmenter.mask(picture, { points, size: [40, 60] }));
    await refuse(() => segmenter.mask(picture, { points, size: [30.5, 20] }));
    await refuse(() => segmenter.mask(picture, { points, earlier: picture }));
    answer(said);"""
    assert in_node(folder, script) == [
        "The decoder returns several masks; decoder.onnx returns one.",
        "10 bytes are not a picture of 2 × 2 pixels in RGB or RGBA.",
        "A picture of 3000 × 1 pixels is too elongated.",
        "There is nothing to go by: give a point or a box.",
        "A mask of 40 × 60 pixels has another shape than the picture.",
        "A mask cannot be of 30.5 × 20 pixels.",
        "`earlier` is to be what `mask` returned before.",
    ]


@pytest.mark.slow
@needs_node
def test_what_the_readme_says_works_as_it_stands(folder: Path, predictor: SamPredictor, tmp_path: Path) -> None:
    """Its command and its code, on a picture that has all the places that these name."""
    place = shutil.copytree(folder, tmp_path / "export", symlinks=True)
    pixels = picture(400, 500)
    Image.fromarray(pixels).save(place / "photo.jpg", quality=95)
    readme = (place / "README.md").read_text()
    predictor.set_image(decode_image((place / "photo.jpg").read_bytes()))
    clicks = [(320, 240, 1), (90, 300, 0)]
    (command,) = (line for line in block(readme, "bash", "JavaScript").splitlines() if line.startswith("node "))
    done = subprocess.run(command, shell=True, cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = expect(predictor, clicks).mask
    assert mask_iou(np.asarray(Image.open(place / "mask.png")) > 0, expected) >= 0.99
    assert 0.01 < expected.mean() < 0.99

    own = block(readme, "javascript", "JavaScript")
    (place / "own.mjs").write_text(
        f"{own}import {{ writeFileSync }} from 'node:fs'; writeFileSync('own', better.mask);"
    )
    done = node(place, "own.mjs")
    assert done.returncode == 0, done.stderr
    mask = np.fromfile(place / "own", np.uint8).reshape(400, 500)
    assert mask_iou(mask > 0, expect_all(predictor, clicks, None, refine=True).mask) >= 0.99
