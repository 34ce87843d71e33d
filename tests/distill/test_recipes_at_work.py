"""The published recipes that end in masks, whole, with students so small that they take seconds."""

import json
from pathlib import Path

import pytest

from embeddings_cache.images.scenes import write_scene_tar
from support import Cli, places

SMALL = {
    "edge_sam": "{widths: [8, 16, 24, 32], depths: [1, 1, 1, 1]}",
    "mobile_sam": "{widths: [8, 16, 24, 32], depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1]}",
    "repvit_m2_3_masks": "{widths: [8, 16, 24, 32], depths: [1, 1, 1, 1]}",
}
TOY = (
    "image_size=128", "teacher.name=toy", "teacher.checkpoint=null", "teacher.batch_size=4", "data.fraction=1",
    "data.val_images=8", "train.workers=0", "export.formats=[onnx]",
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many as two batches of 16, and 8 to hold out."""
    path = tmp_path_factory.mktemp("scenes") / "sa_000000.tar"
    write_scene_tar(path, range(40), longest_side=160)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_published_recipe_goes_from_images_to_exports(name: str, scenes: Path, tmp_path: Path, cli: Cli) -> None:
    settings = [*TOY, *places(tmp_path, scenes), f"student.overrides={SMALL[name]}", "student.pretrained=false"]
    result = cli(f"recipe={name}", *settings, "stage=all")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line["val_mse"] for line in lines if "val_mse" in line]
    phases = {"edge_sam": 10 + 5, "mobile_sam": 8, "repvit_m2_3_masks": 8 + 5}[name]
    assert len(scores) == 1 + phases  # before the first epoch, and after each
    assert scores[phases - 5 if phases > 8 else -1] < 0.9 * scores[0]
    masks = [line["mask_bce"] for line in lines if "mask_bce" in line]
    assert bool(masks) == (phases > 8)
    assert all(
        "mse" not in line for line in lines if "mask_bce" in line and "mse" in line and line["epoch"] >= phases - 4
    )
    assert (run / "export" / "encoder.onnx").stat().st_size > 0
    assert (run / "report" / "index.html").stat().st_size > 0
