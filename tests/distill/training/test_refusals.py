"""What cannot be trained is refused in a line, before anything is written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from distill.main import main
from distill.recipe import load_recipe
from distill.run import refuse_other_settings
from embeddings_cache.shards.format import read_info
from students import InputError
from support import TINY, Cli, places


@pytest.fixture
def arguments(finished_run: Path, scene_tar: Path, tmp_path: Path) -> list[str]:
    images, _, cache = places(finished_run, scene_tar)
    return [*TINY, "stage=train", images, cache, f"run_dir={tmp_path / 'run'}"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.batch_size=64"], "train.batch_size=64 is more than the 20 training images in the cache"),
        (["data.val_images=24"], "data.val_images=24 leaves none of the cache's 24 images to train on"),
        (["train.trackers=[aim]"], "train.trackers: aim is not installed: pip install aim"),
        (["stage=all", "cache.per_node=true"], "cache.per_node=true takes shards that are there"),
        (["image_size=192"], "image_size: 128, not 192"),
    ],
)
def test_refused(settings: list[str], said: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, *settings]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert said in errors[-1]
    run_dir = Path(arguments[-1].partition("=")[2])
    assert not (run_dir / "checkpoints").exists()


def test_an_empty_cache(
    arguments: list[str], finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((finished_run / "cache" / "cache.json").read_text())
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.json").write_text(json.dumps({**content, "images": 0, "shards": 0}))
    assert main([*arguments, f"cache.dir={tmp_path / 'cache'}"]) == 2
    assert f"the cache at {tmp_path / 'cache'} is empty" in capsys.readouterr().err


def test_a_cache_of_other_shapes(arguments: list[str], finished_run: Path) -> None:
    info = read_info(finished_run / "cache")
    assert info is not None
    with pytest.raises(InputError, match="has embeddings of 256 × 4 × 4; students at 128 px make 8 × 8 cells"):
        refuse_other_settings(load_recipe(arguments), replace(info.identity, embedding_shape=(256, 4, 4)))


def test_the_loss_mask_takes_the_teachers_weights(
    arguments: list[str], finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ViT-H's cache and no checkpoint; without the loss, training would do with the cache alone."""
    shutil.copytree(finished_run / "cache", tmp_path / "cache")
    path = tmp_path / "cache" / "cache.json"
    content = json.loads(path.read_text())
    content["identity"] |= {"teacher_name": "vit_h", "image_size": 1024, "embedding_shape": [256, 64, 64]}
    path.write_text(json.dumps(content))
    settings = [
        "teacher.name=vit_h",
        "image_size=1024",
        f"cache.dir={tmp_path / 'cache'}",
        "train.loss={mse: 1, mask: 1}",
    ]
    assert main([*arguments, *settings]) == 2
    assert "vit_h" in (said := capsys.readouterr().err.strip().splitlines()[-1])
    assert "teacher.checkpoint" in said


@pytest.mark.slow
def test_synchronised_batch_norms_on_a_cpu(arguments: list[str], cli: Cli) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    result = cli(*arguments, "train.batch_norm=sync", launcher=launcher)
    assert result.returncode != 0
    assert "train.batch_norm=sync needs GPUs: PyTorch has none for CPUs; take local or frozen" in result.stderr
