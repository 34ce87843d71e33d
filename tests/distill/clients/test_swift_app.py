"""The whole Swift package of an export at work, with stand-ins where Apple's frameworks would be, and Core ML's
packages executed by torch: it has to make what `SamPredictor` makes of the same pictures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamPredictor

from core_ml import answering, stand_in
from distill.evaluate.ious import mask_iou
from distill.export.coreml.conversion import convert_decoder, convert_encoder
from distill.export.coreml.package import save_package
from distill.export.encoder import RgbEncoder
from distill.export.handover.readme import swift_snippet
from distill.export.swift import EXAMPLE
from embeddings_cache.images import generate_scene, resized_shape
from embeddings_cache.images.decoding import UPRIGHT
from exports import SIZE, small_student, toy
from students import build_student_sam
from swift import PROMPTS, SOURCES, needs_swift, on_stand_ins, stored, swift, written


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A small student's, and its teacher's decoder."""
    folder = tmp_path_factory.mktemp("packages")
    encoder, decoder = folder / "SmallEncoder.mlpackage", folder / "SmallDecoder.mlpackage"
    save_package(convert_encoder(RgbEncoder(small_student(), eight_bit=True).eval()), encoder)
    save_package(convert_decoder(toy()), decoder)
    return [encoder, decoder]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, packages: list[Path]) -> Path:
    """The package as an export has it, with stand-ins for Apple's frameworks, in a folder with stand-ins of Core ML's
    packages; the README's code is compiled along with it."""
    export = tmp_path_factory.mktemp("app")
    cells = SIZE // 16
    logits = {"low_res_masks": [1, 4, 4 * cells, 4 * cells], "iou_predictions": [1, 4]}
    for package, outputs in zip(packages, ({"image_embeddings": [1, 128, cells, cells]}, logits), strict=True):
        stand_in(package, export, outputs)
    package = written(export)
    imports, _, shown = swift_snippet([each.name for each in packages]).partition("\n\n")
    readme = f"\n{imports}\nfunc readme(_ image: CGImage) async throws {{\n{shown}\n_ = shown\n}}\n"
    on_stand_ins(package, (SOURCES / "segment.swift").read_text() + readme)
    example = package / EXAMPLE / "example.png"
    as_file(example, np.asarray(Image.open(example)))
    swift(package, "build", "--build-tests")
    return package


def as_file(path: Path, picture: np.ndarray, orientation: int = 1, alpha: bool = False) -> None:
    """A picture as the stand-in of Image I/O reads it."""
    kind = 3 if alpha else 5  # kCGImageAlphaLast, kCGImageAlphaNoneSkipLast
    height, width = picture.shape[:2]
    path.write_bytes(f"{width} {height} {orientation} {kind}\n".encode() + stored(picture, "rgba", 0))


needs_stand_ins = pytest.mark.skipif(sys.platform == "darwin", reason="has Apple's own frameworks")


@pytest.mark.slow
@needs_swift
@needs_stand_ins
def test_a_segmenter_gives_the_predictors_masks(app: Path, packages: list[Path]) -> None:
    """From a file to a mask: landscape, lying on its side, a strip, with alpha; clicks, a box, both, and a correction;
    at the picture's size and another."""
    predictor = SamPredictor(build_student_sam(small_student(), toy()))
    shapes = ((150, 209, 1, False), (190, 120, 6, False), (31, 277, 1, False), (128, 128, 3, True))
    jobs, uprights = [], []
    for number, (height, width, orientation, alpha) in enumerate(shapes):
        picture = generate_scene(np.random.default_rng(3), 300)[0][:height, :width]
        as_file(app / f"{number}.picture", picture, orientation, alpha)
        turned = Image.fromarray(picture)
        uprights.append(np.asarray(turned.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else turned))
        scale = np.array(uprights[-1].shape[1::-1])
        prompts = []
        for share, again in [*((each, False) for each in PROMPTS), (PROMPTS[4], True)]:
            points = (np.array(share.get("points", np.empty((0, 2)))) * scale).tolist()
            box = (np.array(share["box"]) * np.tile(scale, 2)).tolist() if "box" in share else []
            prompts.append({"points": points, "labels": share.get("labels", []), "box": box, "again": again, "at": []})
        prompts.append({**prompts[2], "at": [70, 50]})
        jobs.append({"file": f"{number}.picture", "prompts": prompts})
    (app / "asked.json").write_text(json.dumps(jobs))
    with answering(app.parent / "predictions", packages) as asked:
        said = run_app(app, "run", "--skip-build", "driver")
    assert said.split() == ["128", "128", "18"]
    assert asked.count("SmallEncoder") == len(jobs)

    ious, shares = [], []
    for number, (upright, answers) in enumerate(
        zip(uprights, json.loads((app / "answered.json").read_text()), strict=True)
    ):
        predictor.set_image(upright)
        low_res = np.zeros(0)
        for place, (given, answer) in enumerate(zip(jobs[number]["prompts"], answers, strict=True)):
            prompt: dict[str, np.ndarray] = {}
            if given["points"]:
                prompt = {"point_coords": np.array(given["points"]), "point_labels": np.array(given["labels"])}
            if given["box"]:
                prompt["box"] = np.array(given["box"])
            if given["again"]:
                prompt["mask_input"] = low_res
            several = len(given["points"]) == 1 and not given["box"]
            masks, predicted, low = predictor.predict(**prompt, multimask_output=several)
            best = int(predicted.argmax())
            expected, low_res = masks[best], low[best : best + 1]
            if given["at"]:
                rows = resized_shape(upright.shape[:2], SIZE)
                found = predictor.model.postprocess_masks(torch.from_numpy(low[None]), rows, tuple(given["at"][::-1]))
                expected = found[0, best].numpy() > 0
            assert answer["size"] == [*expected.shape[::-1]]
            assert abs(answer["iou"] - predicted[best]) < 1e-2
            mask = np.fromfile(app / f"{number}-{place}.png", np.uint8).reshape(expected.shape) > 0
            ious.append(mask_iou(mask, expected))
            shares.append(expected.mean())
    print(f"IoU with SamPredictor: mean {np.mean(ious):.4f}, worst {min(ious):.4f}")
    assert min(ious) >= 0.95  # the packages are float16
    assert np.mean(ious) >= 0.99
    assert 0.02 < np.median(shares) < 0.9  # or there would be nothing to compare


@pytest.mark.slow
@needs_swift
@needs_stand_ins
def test_the_program_and_the_tests_for_a_mac_run(app: Path, packages: list[Path]) -> None:
    picture = generate_scene(np.random.default_rng(3), 300)[0][:150, :209]
    as_file(app / "photo", picture)
    with answering(app.parent / "asked", packages):
        said = run_app(app, "run", "--skip-build", "segment", "photo", "80", "75", folder="asked")
        tested = run_app(app, "test", "--skip-build", folder="asked")
    predictor = SamPredictor(build_student_sam(small_student(), toy()))
    predictor.set_image(picture)
    masks, ious, _ = predictor.predict(np.array([[80, 75]]), np.array([1]))
    found = np.fromfile(app / "mask.png", np.uint8).reshape(picture.shape[:2]) > 0
    assert mask_iou(found, masks[ious.argmax()]) >= 0.98
    assert f"mask.png: {found.sum()} pixels, predicted IoU" in said
    assert "OnAMacTests" in tested
    assert "skipped" not in tested


def run_app(app: Path, *arguments: str, folder: str = "predictions") -> str:
    known = {"CORE_ML": f"../{folder}", "XDG_CACHE_HOME": str(app.parent / "caches")}
    return swift(app, *arguments, environment=known)
