"""What the JavaScript programs make of a command line and a prompt, before a model or a package is there."""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image
from segment_anything import SamPredictor

from distill.export.prompts import points_of
from exports import SIZE, toy
from npm import needs_node
from programs import PROGRAMS, PROMPTS, in_node, lay_programs, node, place, refused


@needs_node
def test_prompts_are_placed_as_by_the_predictor(tmp_path: Path) -> None:
    width, height = 977, 313
    cases = [place(prompt, (width, height)) for prompt in PROMPTS.values()]
    script = """
    import { toDecoder } from "./segmenter.mjs";
    import { resized } from "./resize.mjs";
    const picture = { width: asked.width, height: asked.height };
    const inside = resized(picture.width, picture.height, asked.size);
    answer(asked.cases.map(([points, box]) => {
      const { coords, labels } = toDecoder({ points, box }, picture, inside);
      return [[...coords], [...labels]];
    }));"""
    asked = {"cases": cases, "width": width, "height": height, "size": SIZE}
    found = in_node(lay_programs(tmp_path), script, asked)
    predictor = SamPredictor(toy())
    predictor.set_image(np.zeros((height, width, 3), np.uint8))
    for (points, box), (coords, labels) in zip(cases, found, strict=True):
        given = np.array(points).reshape(-1, 3)
        prompt = {"point_coords": given[:, :2], "point_labels": given[:, 2]}
        if box:
            prompt["box"] = np.sort(np.reshape(box, (2, 2)), axis=0).reshape(-1)
        wanted_coords, wanted_labels = points_of(predictor, prompt)
        np.testing.assert_allclose(np.reshape(coords, (-1, 2)), wanted_coords[0], rtol=1e-6)
        assert labels == wanted_labels[0].tolist()


REFUSED = {
    "{}": "There is nothing to go by: give a point or a box.",
    "{ points: [], box: null }": "There is nothing to go by",
    "{ points: [[1, NaN, 1]] }": "A point is [x, y, label] in pixels, not [1, NaN, 1].",
    "{ points: [[Infinity, 1, 1]] }": "A point is [x, y, label] in pixels, not [Infinity, 1, 1].",
    "{ points: [[1]] }": "A point is [x, y, label] in pixels, not [1].",
    "{ points: [[1, 2]] }": "A point's label is 1 on the object or 0 beside it, not undefined.",
    "{ points: [[1, 2, 2]] }": "A point's label is 1 on the object or 0 beside it, not 2.",
    "{ points: [['1', '2', 1]] }": "A point is [x, y, label] in pixels, not [1, 2, 1].",
    "{ points: [1, 2, 1] }": "A point is [x, y, label] in pixels, not 1.",
    "{ box: [1, 2, 3] }": "A box is [x0, y0, x1, y1] in pixels, not [1, 2, 3].",
    "{ box: [1, 2, 3, NaN] }": "A box is [x0, y0, x1, y1] in pixels, not [1, 2, 3, NaN].",
    "{ box: [[1, 2], [3, 4]] }": "A box is [x0, y0, x1, y1] in pixels",
    "{ box: [4, 5, 4, 5] }": "The corners of a box are one point, 4,5.",
}


@needs_node
def test_what_no_mask_can_be_made_of_is_refused(tmp_path: Path) -> None:
    cases = ", ".join(REFUSED)
    script = f"""
    import {{ toDecoder }} from "./segmenter.mjs";
    const refusal = (prompt) => {{
      try {{
        return toDecoder(prompt, {{ width: 40, height: 30 }}, [128, 96]);
      }} catch (error) {{
        return error.message;
      }}
    }};
    answer([{cases}].map(refusal));"""
    for (case, reason), said in zip(REFUSED.items(), in_node(lay_programs(tmp_path), script), strict=True):
        assert isinstance(said, str), case
        assert said.startswith(reason), case
        assert "\n" not in said


@needs_node
def test_bytes_with_and_without_alpha_are_resized_alike(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (23, 31, 4), dtype=np.uint8)
    script = """
    import { Resizer } from "./resize.mjs";
    answer(asked.map(([pixels, bytes]) => {
      const resizer = new Resizer(31, 23, 16, 12);
      resizer.push(Uint8Array.from(pixels), bytes);
      return [...resizer.finish()];
    }));"""
    asked = [[pixels.reshape(-1).tolist(), 4], [pixels[..., :3].reshape(-1).tolist(), 3]]
    four, three = in_node(lay_programs(tmp_path), script, asked)
    assert four == three
    expected = Image.fromarray(pixels[..., :3].copy()).resize((16, 12), Image.Resampling.BILINEAR)
    assert three == np.asarray(expected).reshape(-1).tolist()


@needs_node
def test_the_program_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    """Before any package is loaded; and which packages it needs."""
    lay_programs(tmp_path)
    for name in ("photo.jpg", "encoder.onnx"):
        (tmp_path / name).write_bytes(b"no such thing")
    cases = {
        (): "no photo is given",
        ("photo.jpg",): "nothing to go by: give a point, X,Y, or --box X0,Y0,X1,Y1",
        ("photo.jpg", "1"): "1 is not a point, X,Y, in pixels",
        ("photo.jpg", "1,"): "1, is not a point",
        ("photo.jpg", "1,2", "--off", "x,y"): "x,y is not a point",
        ("photo.jpg", "--box", "1,2,3"): "1,2,3 is not a box",
        ("photo.jpg", "1,2", "--longest", "0"): "--longest is a number of pixels, not 0",
        ("photo.jpg", "1,2", "--where", "x"): "Unknown option '--where'",
        ("gone.jpg", "1,2"): "gone.jpg: no such file",
        ("photo.jpg", "1,2", "--encoder", "gone.onnx"): "gone.onnx: no such file",
        ("photo.jpg", "1,2"): "decoder.onnx: no such file",
    }
    for arguments, reason in cases.items():
        refused(tmp_path, arguments, reason)
    (tmp_path / "decoder.onnx").write_bytes(b"no such thing")
    refused(tmp_path, ("photo.jpg", "1,2"), "is not installed: npm install")
    shown = node(tmp_path, "segment.mjs", "--help")
    assert shown.returncode == 0
    options = re.findall(r"^  (\w+): \{ type", (PROGRAMS / "segment.mjs").read_text(), re.MULTILINE)
    assert all(f"--{name}" in shown.stdout for name in set(options) - {"help"})


def test_every_file_that_a_file_names_is_there(tmp_path: Path) -> None:
    lay_programs(tmp_path)
    for file in [*tmp_path.glob("*.mjs"), tmp_path / "segment.html"]:
        text = file.read_text()
        for module in re.findall(r'(?:from|import\() ?"\./([^"]+)"', text):
            in_package = re.fullmatch(r"node_modules/([^/]+)/.+", module)
            if in_package:
                assert in_package[1] in json.loads((tmp_path / "package.json").read_text())["dependencies"]
            else:
                assert (tmp_path / module).is_file(), f"{file.name} imports {module}"
    page = (tmp_path / "segment.html").read_text()
    assert set(re.findall(r'\$\("([^"]+)"\)', page)) <= set(re.findall(r'id="([^"]+)"', page))
    assert not re.search(r"https?://", page)
