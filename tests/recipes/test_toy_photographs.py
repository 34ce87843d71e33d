"""A toy that learns from labelled pictures: `python -m recipes.toy_teacher images=...`."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embeddings_cache.images import Sample, decode_rle, encode_rle
from embeddings_cache.system import sha256
from embeddings_cache.teacher import build_toy_sam, inspect_teacher, load_teacher, load_toy_teacher, weights_sha256
from pictures import encoded, write_tar
from recipes import toy_photographs, toy_teacher
from recipes.toy_photographs import Photograph, augment, load_photographs, read_settings, shrink
from support import Cli

QUARTERS = [np.s_[:32, :48], np.s_[:32, 48:], np.s_[32:, :48], np.s_[32:, 48:]]
"""Of a picture of 96×64 px, what is labelled; and the upper two again, as a fifth mask over both."""

Pictures = Callable[..., str]


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    """Write a tar of so many labelled pictures; with `masks=False` without labels."""

    def write(count: int, name: str = "sa_000000.tar", masks: bool = True) -> str:
        members: dict[str, bytes] = {}
        for number in range(count):
            image, labels = labelled_picture(number)
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            members[f"sa_{number}.png"] = buffer.getvalue()
            if masks:
                entries = [{"segmentation": encode_rle(mask)} for mask in labels]
                members[f"sa_{number}.json"] = json.dumps({"annotations": entries}).encode()
        return write_tar(tmp_path / name, members)

    return write


def labelled_picture(seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """RGB (64, 96, 3), the same noise all over, and five masks of it: nothing that the package's toy would see."""
    image = np.random.default_rng(seed).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    masks = []
    for quarter in QUARTERS:
        mask = np.zeros((64, 96), dtype=bool)
        mask[quarter] = True
        masks.append(mask)
    return image, [*masks, masks[0] | masks[1]]


def test_it_learns_from_pictures_with_overlapping_masks_and_teaches(
    pictures: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """From the package's weights; on pictures that it has not seen it is better than those, and than drawn ones."""
    monkeypatch.setattr(toy_teacher, "BATCH", 2)
    for module in (toy_teacher, toy_photographs):
        monkeypatch.setattr(module, "TOY_IMAGE_SIZE", 128)
    images, out, package = pictures(12), tmp_path / "small_sam.safetensors", sha256(toy_teacher.PACKAGE_WEIGHTS)
    test = pictures(4, "sa_000001.tar")
    assert toy_teacher.main([f"images={images}", "--out", str(out), f"test={test}", "--steps", "16"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("toy teacher: 12 photographs with 60 masks, 4 others to measure on; a box that is filled")
    assert f"{out}: " in said[-1]
    assert "mIoU {'point': " in said[-1]
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [out.name]
    assert sha256(toy_teacher.PACKAGE_WEIGHTS) == package

    _, others = load_photographs(read_settings([f"images={images}", f"test={test}"]), toy_teacher.Accelerator())
    torch.manual_seed(0)
    untrained, before = (toy_teacher.score(sam, others) for sam in (build_toy_sam(128), load_toy_teacher(128)))
    after = toy_teacher.score(load_teacher("toy", str(out), 128), others)
    print(untrained, before, after)
    assert after["point"] > max(untrained["point"], before["point"]) + 0.05
    assert after["box"] > untrained["box"] + 0.05

    cache = tmp_path / "cache"
    keys = ("image_size=128", f"data.images={test}", "data.val_images=1", f"teacher.checkpoint={out}")
    made = cli("recipe=quickstart", "stage=precompute", *keys, f"cache.dir={cache}", f"run_dir={tmp_path / 'run'}")
    assert made.returncode == 0, made.stderr
    teacher = json.loads((cache / "cache.json").read_text())
    assert weights_sha256(load_teacher("toy", str(out), 128)) in json.dumps(teacher)


def test_some_are_held_out_where_no_others_are_named(pictures: Pictures) -> None:
    learnt, others = load_photographs(read_settings([f"images={pictures(24)}"]), toy_teacher.Accelerator())
    assert (len(learnt), len(others)) == (22, 2)
    assert not {photograph.key for photograph in learnt} & {image.key for image in others}


def test_a_picture_whose_masks_are_empty_is_not_measured_on(pictures: Pictures, tmp_path: Path) -> None:
    entries = json.dumps({"annotations": [{"segmentation": encode_rle(np.zeros((30, 40), dtype=bool))}]})
    empty = write_tar(tmp_path / "empty.tar", {"empty.jpg": encoded(), "empty.json": entries.encode()})
    settings = [f"images=[{pictures(3)}, {empty}]", f"test=[{empty}, {pictures(2, 'test.tar')}]"]
    learnt, others = load_photographs(read_settings(settings), toy_teacher.Accelerator())
    assert (len(learnt), [image.key for image in others]) == (3, ["sa_0", "sa_1"])


def test_masks_go_where_their_picture_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut, mirrored and resized: every mask still lies on its colour, and what was cut away is not asked for."""
    monkeypatch.setattr(toy_photographs, "JITTER", 0.0)
    colours = np.zeros((64, 96), dtype=np.uint8)
    colours[:, 12:], colours[:, 24:], colours[32:] = 80, 160, 240
    masks = [encode_rle(colours == value) for value in (0, 80, 160, 240)]
    photograph = Photograph("x", np.stack([colours] * 3, axis=2), masks)
    rng, counts = np.random.default_rng(0), set()
    for _ in range(20):
        pixels, found = augment(photograph, 96, rng)
        assert pixels.shape == (3, 96, 96)
        values = pixels[0] * 58.395 + 123.675
        counts.add(len(found))
        spread = [float((values[mask] - values[mask].median()).abs().median()) for mask in found]
        assert max(spread) < 1
        assert len({round(float(values[mask].median()) / 80) for mask in found}) == len(found)
    assert len(counts) > 1


def test_large_pictures_are_kept_small() -> None:
    mask = np.zeros((900, 1200), dtype=bool)
    mask[300:600, 400:800] = True
    entries = json.dumps({"annotations": [{"segmentation": encode_rle(mask)}]})
    kept = shrink(Sample("x", Image.new("RGB", (1200, 900)), entries))
    assert kept.image.shape == (288, 384, 3)
    (small,) = map(decode_rle, kept.masks)
    assert small.shape == (288, 384)
    assert abs(small.mean() - mask.mean()) < 0.005


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["images=nowhere/*.tar"], "no images: nothing matches"),
        (["images={bare}"], "none with masks to learn from: 3 images without a mask of 25 px"),
        (["images={broken}"], "none with masks to learn from: broken: "),
        (["images={one}"], "one photograph with masks; measuring takes another: test="),
        (["images={good}", "test={bare}"], "no image with masks to measure on"),
        (["images={good}", "test=nowhere.tar"], "do not exist: nowhere.tar"),
        (["images={good}", "train.epochs=3"], "'train.epochs=3' is not known"),
        (["test={good}"], "images= names no photographs"),
        (["images=scenes:12"], "images= names no photographs"),
        (["images={good}", "--start", "{bare}"], "is not a checkpoint"),
        (["--start", "none"], "--start and --steps are for photographs"),
        (["images={good}", "--steps", "0"], "--short and --steps take positive numbers"),
        (["images={good}", "--out", "nowhere/x.safetensors"], "--out nowhere/x.safetensors is no"),
        (["images={good}", "--out", "small_sam.pth"], "--out small_sam.pth is no"),
    ],
)
def test_what_cannot_be_is_one_line(
    settings: list[str], message: str, pictures: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = write_tar(tmp_path / "broken.tar", {"broken.jpg": encoded()[:200]})
    tars = {"bare": pictures(3, "bare.tar", False), "one": pictures(1, "one.tar"), "good": pictures(2, "good.tar")}
    out = tmp_path / "small_sam.safetensors"
    arguments = [setting.format(**tars, broken=broken) for setting in settings]
    assert toy_teacher.main(["--out", str(out), *arguments]) == 2
    said = capsys.readouterr().err.rstrip().splitlines()
    assert said[-1].startswith("toy_teacher: ")
    assert message in said[-1]
    assert not out.exists()


def test_the_package_keeps_its_weights(pictures: Pictures, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where another spelling names them."""
    same = toy_teacher.PACKAGE_WEIGHTS.parent / ".." / "teacher" / toy_teacher.PACKAGE_WEIGHTS.name
    for out in ([], ["--out", str(same)]):
        assert toy_teacher.main([f"images={pictures(2)}", *out]) == 2
        assert "say --out FILE.safetensors, so that the package keeps its weights" in capsys.readouterr().err


def test_scenes_are_what_it_learns_from_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"SCENES": 3, "BATCH": 2, "MEASURED_SCENES": 1, "PHASES": ((32, 1), (64, 1))}
    for name, value in small.items():
        monkeypatch.setattr(toy_teacher, name, value)
    outs = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for out in outs:
        assert toy_teacher.main(["--out", str(out)]) == 0
        assert f"{out}: " in capsys.readouterr().out
    assert sha256(outs[0]) == sha256(outs[1])
    assert inspect_teacher(outs[0]).image_size == 64
