import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pictures import ANNOTATION, encoded
from support import Cli


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Thirty photographs, some with annotations, and things that are none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(28):
        (folder / f"{number:02d}.jpg").write_bytes(encoded(size=(40, 30)))
        if number % 4 == 0:
            (folder / f"{number:02d}.json").write_bytes(ANNOTATION)
    (folder / "more" / "a.tif").write_bytes(encoded("TIFF", size=(2000, 1000)))
    (folder / "more" / "b.jpg").write_bytes(encoded(size=(400, 300)))
    (folder / "b.json").write_bytes(b"{}")
    (folder / "01.json").write_bytes(b"not JSON")
    (folder / "cut.jpg").write_bytes(encoded(size=(400, 300))[:2000])
    (folder / "thin.png").write_bytes(encoded("PNG", size=(1000, 1)))
    (folder / "clip.mp4").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg")).write_bytes(encoded())  # as Latin-1 has it
    return folder


def test_inspect_says_what_precompute_will_do(photographs: Path, tmp_path: Path, cli: Cli) -> None:
    given = (f"data.images={photographs}", f"run_dir={tmp_path / 'run'}", f"cache.dir={tmp_path / 'cache'}")
    result = cli("recipe=quickstart", "stage=inspect", "image_size=128", *given)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "run" / "inspect.json").read_text())
    assert (content["images"], content["kinds"]) == (30, {"jpg": 29, "tif": 1})
    assert (content["smallest"], content["largest"]) == ([30, 40], [1000, 2000])
    assert content["annotated"] == {"images": 7, "masks": 7, "median_masks": 1}
    assert {entry["keys"][0]: entry["reason"].split(":")[0] for entry in content["skipped"]} == {
        "cut": "OSError",
        "thin": "1000×1 px is too elongated for a longest side of 128 px",
        os.fsdecode(b"caf\xe9"): "its name is not printable text",
    }
    assert content["noted"] == [
        {"reason": "annotation not used: not JSON: Expecting value", "count": 1, "keys": ["01"]}
    ]
    assert content["left_out"] == {".json": 1, ".mp4": 1}
    assert content["precompute"]["rows"] == 30
    for words in ("images        30: 29 jpg, 1 tif", "skipped       1×", "left out      1 .json, 1 .mp4", "30 rows"):
        assert words in result.stdout
    sheet = np.asarray(Image.open(tmp_path / "run" / "inspect.jpg"))
    assert sheet.shape[1] > sheet.shape[0] > 0
    assert (sheet.std(axis=(0, 1)) > 20).all()
    made = cli(
        "recipe=quickstart", "stage=precompute", "image_size=128", *given, "data.max_skipped=0.2", "data.val_images=4"
    )
    assert made.returncode == 0, made.stderr
    info = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert (info["images"], info["skipped"], info["noted"]) == (30, 3, 1)
    assert info["left_out"] == content["left_out"]
    taken = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.h5"))
    assert taken / 4 < content["precompute"]["bytes"] < 4 * taken
    lines = [line for line in made.stdout.splitlines() if line.startswith("precompute: ")]
    assert lines[0] == (
        "precompute: 33 images (31 .jpg, 1 .png, 1 .tif) in 1 folder; 8 with annotations; left out: 1 .json, 1 .mp4"
    )
    assert "GiB needed for 33 images" in lines[1]
    assert lines[-2].endswith("most often (1×, as in 01): annotation not used: not JSON: Expecting value")
    assert lines[-1].endswith(
        "30 images in " + str(tmp_path / "cache") + ", notes on 1 of them (notes.jsonl), "
        "3 bad samples skipped (skipped.jsonl), 1 .json, 1 .mp4 left out"
    )


def test_inspect_needs_photographs(tmp_path: Path, cli: Cli) -> None:
    result = cli("recipe=quickstart", "stage=inspect", f"run_dir={tmp_path}")
    assert result.returncode == 2
    assert "stage=inspect looks at photographs" in result.stderr
