"""The programs that lie beside an export's models: pictures to try them on, and what `SamPredictor` makes of these."""

import io
import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms
from segment_anything import SamPredictor

from distill.clients import write_client
from distill.evaluate.ious import mask_iou
from embeddings_cache.images.decoding import decode_image
from embeddings_cache.images.scenes import generate_scene
from support import ROOT

PROGRAMS = ROOT / "distill" / "clients" / "programs"

Point = tuple[float, float, int]
"""x and y in shares of the picture, and 1 on the object or 0 beside it."""


@dataclass(frozen=True)
class Prompt:
    """What a person points at, a box in shares of the picture too; `refine`: each click corrects the mask before."""

    points: tuple[Point, ...] = ()
    box: tuple[float, float, float, float] | None = None
    refine: bool = False


CLICKS: tuple[Point, ...] = ((0.4, 0.5, 1), (0.2, 0.6, 1), (0.8, 0.7, 0))
BOX = (0.8, 0.1, 0.2, 0.9)  # from its upper right corner

PROMPTS = {
    "click": Prompt(CLICKS[:1]),
    "clicks of both kinds": Prompt(CLICKS),
    "box": Prompt(box=BOX),
    "box with clicks": Prompt(CLICKS[1:], BOX),
    "refine": Prompt(CLICKS, refine=True),
}


# --- pictures --------------------------------------------------------------------------------------------------------


def picture(height: int, width: int) -> np.ndarray:
    scene, _ = generate_scene(np.random.default_rng(3), 1000)
    return np.ascontiguousarray(np.tile(scene, (1, 2, 1))[:height, :width])


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def with_alpha(pixels: np.ndarray) -> Image.Image:
    """Alpha that comes and goes, and in a tenth of the picture nothing but colour under transparency."""
    height, width = pixels.shape[:2]
    alpha = np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))
    alpha[: height // 10] = 0
    return Image.fromarray(np.dstack([pixels, alpha]))


def sixteen_bits(pixels: np.ndarray) -> Image.Image:
    """Grey, with lower 8 bits that matter to whoever rounds."""
    grey = np.asarray(Image.fromarray(pixels).convert("L")).astype(np.uint16)
    return Image.fromarray(grey * 256 + np.random.default_rng(0).integers(0, 256, grey.shape).astype(np.uint16))


def pictures() -> dict[str, bytes]:
    """The files that masks are made of, by name."""
    photo = Image.fromarray(picture(480, 640))
    enlarged = photo.resize((4000, 3000), Image.Resampling.BICUBIC)
    return {
        "landscape.jpg": encoded(Image.fromarray(picture(150, 209)), "JPEG", quality=90),
        "portrait.png": encoded(Image.fromarray(picture(190, 60))),
        "turned.jpg": encoded(Image.fromarray(picture(120, 170)), "JPEG", exif=turned(6)),
        "alpha.png": encoded(with_alpha(picture(128, 160))),
        "strip.png": encoded(Image.fromarray(picture(31, 977))),
        "deep.png": encoded(sixteen_bits(picture(140, 130))),
        "large.jpg": encoded(enlarged, "JPEG", quality=90),
    }


def kinds() -> dict[str, bytes]:
    """Files of many kinds, whose pixels are compared."""
    pixels = picture(97, 131)
    image = Image.fromarray(pixels)
    noise = np.random.default_rng(0).integers(0, 256, (97, 131, 4), dtype=np.uint8)
    found = {f"exif{way}.jpg": encoded(image, "JPEG", exif=turned(way)) for way in range(1, 9)}
    found |= {f"exif{way}.png": encoded(image, exif=turned(way)) for way in range(1, 9)}
    return {
        **found,
        "420.jpg": encoded(image, "JPEG", quality=80, subsampling=2),
        "422.jpg": encoded(image, "JPEG", quality=80, subsampling=1),
        "444.jpg": encoded(image, "JPEG", quality=80, subsampling=0),
        "progressive.jpg": encoded(image, "JPEG", quality=80, progressive=True),
        "grey.jpg": encoded(image.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "profile.jpg": encoded(image, "JPEG", icc_profile=other_profile()),
        "grey.png": encoded(image.convert("L")),
        "palette.png": encoded(image.convert("P")),
        "alpha.png": encoded(Image.fromarray(noise)),
        "grey_alpha.png": encoded(Image.fromarray(noise[..., :2].copy())),
        "deep.png": encoded(sixteen_bits(pixels)),
        "profile.png": encoded(image, icc_profile=other_profile()),
        "lossy.webp": encoded(image, "WEBP", quality=80),
        "alpha.webp": encoded(Image.fromarray(noise), "WEBP", lossless=True, exact=True),
        "dot.png": encoded(image.crop((0, 0, 1, 1))),
        "wide.png": encoded(Image.fromarray(np.tile(noise[:20], (1, 17, 1)))),  # wider than what is read at a time
        "tall.png": encoded(Image.fromarray(np.tile(noise[:, :20], (23, 1, 1)))),
    }


def other_profile() -> bytes:
    """sRGB with red and green exchanged: who heeds it shows it."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ", 128), profile.index(b"gXYZ", 128)
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


@dataclass
class Expected:
    """`SamPredictor`'s answer: boolean (H, W), predicted IoU, and low-resolution logits (1, 4h, 4w)."""

    mask: np.ndarray
    iou: float
    low_res: np.ndarray


def place(prompt: Prompt, size: tuple[int, int]) -> tuple[list[Point], list[float] | None]:
    """Points and box in whole pixels of a picture of some width and height."""
    points = [(round(x * size[0]), round(y * size[1]), label) for x, y, label in prompt.points]
    box = [round(share * size[axis % 2]) for axis, share in enumerate(prompt.box)] if prompt.box else None
    return points, box  # type: ignore[return-value]


def expect(
    predictor: SamPredictor, points: list[Point], box: list[float] | None = None, earlier: np.ndarray | None = None
) -> Expected:
    """Of one click the best of three masks, else the one for clear prompts."""
    given: dict[str, Any] = {} if earlier is None else {"mask_input": earlier}
    if points:
        given |= {"point_coords": np.array(points)[:, :2], "point_labels": np.array(points)[:, 2]}
    if box:
        corners = np.sort(np.reshape(box, (2, 2)), axis=0)
        given["box"] = corners.reshape(-1)
    masks, ious, low_res = predictor.predict(**given, multimask_output=len(points) == 1 and not box)
    best = int(ious.argmax())
    return Expected(masks[best], float(ious[best]), low_res[best : best + 1])


def expect_all(predictor: SamPredictor, points: list[Point], box: list[float] | None, refine: bool = False) -> Expected:
    """Likewise; `refine`: of one click after the other."""
    found = None
    for count in range(1 if refine else len(points), len(points) + 1):
        found = expect(predictor, points[:count], box, found.low_res if found else None)
    assert found is not None
    return found


def lay_programs(folder: Path) -> Path:
    """What an export has beside its models."""
    folder.mkdir(parents=True, exist_ok=True)
    write_client("programs", folder, {})
    return folder


def node(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def in_node(folder: Path, script: str, asked: Any = None) -> Any:
    """What a script hands to `answer`; `asked` is at hand."""
    (folder / "asked.json").write_text(json.dumps(asked))
    (folder / "run.mjs").write_text(
        'import { readFileSync, writeFileSync } from "node:fs";\n'
        'const asked = JSON.parse(readFileSync("asked.json"));\n'
        'const answer = (value) => writeFileSync("answered.json", JSON.stringify(value));\n' + script
    )
    done = node(folder, "run.mjs")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answered.json").read_text())


def refused(folder: Path, arguments: tuple[str, ...], reason: str) -> None:
    done = node(folder, "segment.mjs", *arguments)
    assert done.returncode == 2, arguments
    assert reason in done.stderr, arguments
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (folder / "mask.png").exists()


def block(readme: str, language: str, heading: str) -> str:
    """The code of a language below a heading."""
    section = readme.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return found


Program = Callable[..., subprocess.CompletedProcess[str]]
"""`segment.py` or `segment.mjs`, by its arguments."""


def check_masks(program: Program, predictor: SamPredictor, photo: Path) -> None:
    """A program's masks of a picture are the predictor's, for prompts of every kind, and what it says of them is so."""
    image = decode_image(photo.read_bytes())
    height, width = image.shape[:2]
    predictor.set_image(image)
    shares = []
    for kind, prompt in PROMPTS.items():
        points, box = place(prompt, (width, height))
        on = [f"{x},{y}" for x, y, label in points if label]
        off = [part for x, y, label in points if not label for part in ("--off", f"{x},{y}")]
        more = [*(["--box", ",".join(map(str, box))] if box else []), *(["--refine"] if prompt.refine else [])]
        done = program(photo, *on, *off, *more, "--out", photo.with_name("found.png"))
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        expected = expect_all(predictor, points, box, prompt.refine)
        with Image.open(photo.with_name("found.png")) as png:
            assert png.mode == "L"
            mask = np.asarray(png)
        assert mask.shape == (height, width)
        assert set(np.unique(mask)) <= {0, 255}
        assert mask_iou(mask > 0, expected.mask) >= 0.99, kind
        said = re.fullmatch(r".*found\.png: (\d+) pixels, predicted IoU (\d\.\d{3})\n", done.stdout)
        assert said, done.stdout
        assert int(said[1]) == (mask > 0).sum()
        assert abs(float(said[2]) - expected.iou) < 2e-3
        shares.append(expected.mask.mean())
    assert sum(0.01 < share < 0.99 for share in shares) >= 3, shares  # or there would be nothing to compare


def check_sizes(program: Program, predictor: SamPredictor, tmp_path: Path) -> None:
    """A mask for a screen is the same mask: at sizes with sides that are no whole multiples, larger than the picture
    too."""
    photo = tmp_path / "landscape.jpg"
    photo.write_bytes(pictures()[photo.name])
    predictor.set_image(decode_image(photo.read_bytes()))
    expected = expect(predictor, [(84, 75, 1)])
    for longest in (100, 333):
        done = program(photo, "84,75", "--longest", longest, "--out", tmp_path / "found.png")
        assert done.returncode == 0, done.stderr
        mask = np.asarray(Image.open(tmp_path / "found.png"))
        assert mask.shape == (round(150 * longest / 209), longest)
        low_res = torch.from_numpy(expected.low_res)[None]
        shown = predictor.model.postprocess_masks(low_res, predictor.input_size, mask.shape)[0, 0].numpy() > 0
        assert mask_iou(mask > 0, shown) >= 0.98
        assert 0.01 < shown.mean() < 0.99
