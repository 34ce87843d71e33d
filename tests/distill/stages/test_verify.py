import shutil
from pathlib import Path

import pytest

from caches import flip_a_bit
from distill.main import main
from embeddings_cache.shards.reader import shard_paths
from support import TINY, places


def test_verify_finds_drops_and_precompute_mends(
    finished_run: Path, scene_tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished_run / "cache", tmp_path / "cache")
    arguments = [*TINY, *places(tmp_path, scene_tar)]
    assert main([*arguments, "stage=verify"]) == 0
    assert "verify: 24 images in 1 shards, all as they should be" in capsys.readouterr().out
    flip_a_bit(shard_paths(tmp_path / "cache")[0], 0)
    assert main([*arguments, "stage=verify", "verify.recompute=0"]) == 1
    told = capsys.readouterr()
    assert "its checksum does not hold" in told.out
    assert told.err.splitlines()[-1].startswith(f"distill.py: the cache at {tmp_path / 'cache'} is damaged: 1 of 1")
    assert main([*arguments, "stage=verify", "verify.drop=true"]) == 1
    assert main([*arguments, "stage=precompute"]) == 0
    assert main([*arguments, "stage=verify"]) == 0


def test_verify_with_another_teacher_is_refused(
    finished_run: Path, scene_tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished_run / "cache", tmp_path / "cache")
    described = tmp_path / "cache" / "cache.json"
    described.write_text(described.read_text().replace('"teacher_name": "toy"', '"teacher_name": "vit_b"'))
    assert main([*TINY, *places(tmp_path, scene_tar), "stage=verify"]) == 2
    assert "teacher.name: 'vit_b', not 'toy'" in capsys.readouterr().err


def test_bfloat16_and_int8_go_through_to_a_student(
    scene_tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("teacher.dtype=bfloat16", "cache.dtype=int8", "train.epochs=1", "stage=all", "train.workers=0")
    assert main([*TINY, *places(tmp_path, scene_tar), *options]) == 0
    assert (tmp_path / "run" / "student.safetensors").exists()
    assert main([*TINY, *places(tmp_path, scene_tar), *options, "stage=precompute", "teacher.dtype=float32"]) == 2
    assert "teacher.dtype: 'bfloat16', not 'float32'" in capsys.readouterr().err
