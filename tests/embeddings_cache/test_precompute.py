import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from caches import SIZE, Make
from embeddings_cache import embed
from embeddings_cache import precompute as precompute_module
from embeddings_cache.images import skipped
from embeddings_cache.images.preprocessing import resize_longest_side
from embeddings_cache.images.samples import Sample, read_images
from embeddings_cache.images.sources import Share
from embeddings_cache.precompute import cache_identity, precompute
from embeddings_cache.shards.format import CacheIdentity
from embeddings_cache.shards.reader import EmbeddingsCache, shard_paths
from embeddings_cache.teacher.encoder import TeacherEncoder
from pictures import encoded
from students import InputError
from support import ROOT


def contents(directory: Path) -> dict[str, tuple[bytes, bytes]]:
    cache = EmbeddingsCache(directory)
    return {row.key: (row.embedding.tobytes(), row.encoded) for row in cache}


def test_every_image_has_one_row(cache_dir: Path, scene_tar: Path) -> None:
    cache = EmbeddingsCache(cache_dir)
    assert cache.keys == sorted(f"sa_{n}" for n in range(24))
    assert [path.name for path in shard_paths(cache_dir)] == [f"shard-00000-0000{n}.h5" for n in range(3)]
    originals = {sample.key: sample for sample in read_images([Share(str(scene_tar))])}
    for row in cache:
        assert row.original_size == originals[row.key].original_size
        assert row.input_size == row.pixels().shape[:2]
        assert max(row.input_size) == SIZE
        assert row.annotation == originals[row.key].annotation


def test_embedding_is_the_teachers_of_the_stored_pixels(cache_dir: Path, sam: Sam) -> None:
    predictor = SamPredictor(sam)
    for row in list(EmbeddingsCache(cache_dir))[:6]:
        predictor.set_image(row.pixels())
        expected = predictor.get_image_embedding()[0]
        torch.testing.assert_close(torch.from_numpy(row.embedding).float(), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_make_the_same_shards(workers: int, tmp_path: Path, cache_dir: Path, make: Make) -> None:
    make(tmp_path, workers=workers)
    ours, theirs = shard_paths(tmp_path), shard_paths(cache_dir)
    assert [path.name for path in ours] == [path.name for path in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        with h5py.File(mine) as first, h5py.File(other) as second:
            assert dict(first.attrs.items()).keys() == dict(second.attrs.items()).keys()
            assert first.keys() == second.keys()
            for name, dataset in first.items():
                assert dataset.shape == second[name].shape
                assert all(np.array_equal(a, b) for a, b in zip(dataset[:], second[name][:], strict=True)), name


@pytest.mark.parametrize(
    ("device", "cores", "processes", "expected"),
    [
        ("cpu", 16, 1, 0), ("mps", 8, 1, 0), ("cuda", 16, 1, 15), ("cuda", 64, 1, 16), ("cuda", 64, 8, 7),
        ("cuda", 8, 8, 1), ("cuda", 1, 1, 1),
    ],
)  # fmt: skip
def test_gpus_share_the_cores(
    device: str, cores: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompute_module, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert precompute_module.worker_count(torch.device(device)) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_report_what_is_skipped_and_noted(workers: int, tmp_path: Path, scene_tar: Path, make: Make) -> None:
    tar = damaged_tar(tmp_path / "bad.tar", scene_tar, broken=2)
    with tarfile.open(tar, "a") as target:
        for name, data in (("dark.png", dark_png()), ("thin.png", encoded("PNG", size=(1, 4000)))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            target.addfile(member, io.BytesIO(data))
    info = make(tmp_path / "c", tar=tar, max_skipped=0.5, workers=workers)
    assert (info.images, info.skipped, info.noted) == (19, 3, 1)
    reasons = [json.loads(line) for line in (tmp_path / "c" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in reasons] == ["sa_0", "sa_1", "thin"]
    assert "too elongated" in reasons[2]["reason"]


def dark_png() -> bytes:
    """16 bits of which the upper four are never used."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 60), 700, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_worker_that_is_killed_ends_the_run_and_what_was_made_is_kept(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    original = embed.prepare

    def killed(sample: Sample, *settings: Any) -> Any:
        if sample.key == "sa_21":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(sample, *settings)

    monkeypatch.setattr(embed, "prepare", killed)
    with pytest.raises(InputError, match="a worker process was killed, for want of memory perhaps; the same command"):
        make(tmp_path, batch_size=1, workers=1)
    assert len(shard_paths(tmp_path)) >= 1
    monkeypatch.undo()
    make(tmp_path, batch_size=1, workers=1)
    assert contents(tmp_path).keys() == contents(cache_dir).keys()


def test_png_keeps_the_resized_pixels_exactly(
    tmp_path: Path, identity: CacheIdentity, scene_tar: Path, make: Make
) -> None:
    make(tmp_path, identity=replace(identity, jpeg_quality="png"))
    originals = {sample.key: sample.image for sample in read_images([Share(str(scene_tar))])}
    for row in EmbeddingsCache(tmp_path):
        assert np.array_equal(row.pixels(), resize_longest_side(originals[row.key], SIZE))


def test_a_finished_cache_needs_no_tar_any_more(
    cache_dir: Path, sam: Sam, identity: CacheIdentity, accelerator: Accelerator
) -> None:
    def gone() -> list[str]:
        raise AssertionError("the tars were looked for")

    before = {path: path.stat().st_mtime_ns for path in cache_dir.iterdir()}
    assert precompute(cache_dir, sam, identity, gone, accelerator).images == 24
    assert {path: path.stat().st_mtime_ns for path in cache_dir.iterdir()} == before


@pytest.mark.parametrize("at", [3, 11, 23])
def test_resumes_after_a_crash_and_redoes_one_shard_at_most(
    at: int, tmp_path: Path, cache_dir: Path, sam: Sam, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    original = TeacherEncoder.__call__
    seen: list[int] = []

    def crashing(encoder: TeacherEncoder, pixels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        if sum(seen) > at:
            raise RuntimeError("power cut")
        return original(encoder, pixels, sizes)

    monkeypatch.setattr(TeacherEncoder, "__call__", crashing)
    with pytest.raises(RuntimeError, match="power cut"):
        make(tmp_path, batch_size=1)
    (tmp_path / ".tmp-shard-00000-00007.h5").write_bytes(b"what a kill leaves behind")
    with pytest.raises(InputError, match="not finished"):
        EmbeddingsCache(tmp_path)

    again: list[int] = []
    monkeypatch.setattr(TeacherEncoder, "__call__", lambda *a: (again.append(len(a[1])), original(*a))[1])
    make(tmp_path, batch_size=1)
    assert sum(again) == 24 - at // 10 * 10
    assert not list(tmp_path.glob(".tmp-*"))
    assert {key: pixels for key, (_, pixels) in contents(tmp_path).items()} == {
        key: pixels for key, (_, pixels) in contents(cache_dir).items()
    }
    for key, (embedding, _) in contents(tmp_path).items():
        ours, theirs = (np.frombuffer(e, np.float16) for e in (embedding, contents(cache_dir)[key][0]))
        np.testing.assert_allclose(ours, theirs, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher_name": "vit_h"}, "teacher.name: 'toy', not 'vit_h'"),
        ({"teacher_sha256": "0" * 64}, "SHA-256 of the teacher's weights"),
        ({"teacher_dtype": "bfloat16"}, "teacher.dtype: 'float32', not 'bfloat16'"),
        ({"dtype": "int8"}, "cache.dtype: 'float16', not 'int8'"),
        ({"image_size": 256}, "image_size: 128, not 256"),
        ({"jpeg_quality": 90}, "cache.jpeg_quality: 95, not 90"),
        ({"data_fraction": 0.5}, "data.fraction: 1.0, not 0.5"),
        ({"data_images": "other.tar"}, "data.images"),
        ({"preprocess": "x"}, "fingerprint of the preprocessing"),
    ],
)
def test_another_cache_is_refused_by_name(
    change: dict, named: str, cache_dir: Path, identity: CacheIdentity, make: Make
) -> None:
    with pytest.raises(InputError) as error:
        make(cache_dir, identity=replace(identity, **change), tar=Path("x"))
    assert named in str(error.value)


def test_a_cache_in_use_is_refused(tmp_path: Path, make: Make) -> None:
    code = "import sys; from pathlib import Path; from embeddings_cache.system import sole_user\n"
    code += "with sole_user(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="in use by another run"):
            make(tmp_path)
        holder.communicate("")
    assert make(tmp_path).complete


def damaged_tar(path: Path, scene_tar: Path, broken: int) -> Path:
    with tarfile.open(scene_tar) as source, tarfile.open(path, "w") as target:
        for number, member in enumerate(source.getmembers()[:40]):
            data = source.extractfile(member).read()
            if number % 2 == 0 and number // 2 < broken:
                data = data[:300]
                member.size = 300
            target.addfile(member, io.BytesIO(data))
    return path


def test_bad_samples_are_recorded_up_to_a_share(tmp_path: Path, scene_tar: Path, make: Make) -> None:
    tar = damaged_tar(tmp_path / "bad.tar", scene_tar, broken=2)
    with pytest.raises(InputError, match=r"2 of 20 samples are bad, more than data.max_skipped=0.05.*sa_0.*Truncated"):
        make(tmp_path / "c", tar=tar, max_skipped=0.05)
    info = make(tmp_path / "c", tar=tar, max_skipped=0.1)
    assert (info.images, info.skipped) == (18, 2)
    lines = [json.loads(line) for line in (tmp_path / "c" / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["sa_0", "sa_1"]
    assert all("truncated" in line["reason"].lower() for line in lines)


def test_a_run_that_goes_wrong_early_stops_early(
    tmp_path: Path, scene_tar: Path, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    monkeypatch.setattr(skipped, "ENOUGH_TO_JUDGE", 3)
    tar = damaged_tar(tmp_path / "bad.tar", scene_tar, broken=8)
    with pytest.raises(InputError, match="3 of 3 samples are bad"):
        make(tmp_path / "c", tar=tar, max_skipped=0.5)
    lines = (tmp_path / "c" / "skipped.jsonl").read_text().splitlines()
    assert ["truncated" in json.loads(line)["reason"].lower() for line in lines] == [True] * 3
    # Images that are there already count as good ones: going on must not be stricter than going through.
    monkeypatch.setattr(skipped, "ENOUGH_TO_JUDGE", 1000)
    make(tmp_path / "d")
    (tmp_path / "d" / "shard-00000-00002.h5").unlink()
    monkeypatch.setattr(skipped, "ENOUGH_TO_JUDGE", 3)
    tar = damaged_tar(tmp_path / "worse.tar", scene_tar, broken=20)
    with tarfile.open(tar, "a") as target, tarfile.open(scene_tar) as source:
        for member in source.getmembers()[40:]:
            target.addfile(member, source.extractfile(member))
    assert make(tmp_path / "d", tar=tar, max_skipped=0.2).complete


def test_what_was_read_before_a_bad_source_is_kept(tmp_path: Path, scene_tar: Path, make: Make) -> None:
    (tmp_path / "bad.tar").write_bytes(b"<html>404</html>" * 100)
    tars = [scene_tar, tmp_path / "bad.tar"]
    with pytest.raises(InputError, match=r"cannot read .*bad\.tar"):
        make(tmp_path / "c", tars=tars, batch_size=1)
    with h5py.File(shard_paths(tmp_path / "c")[-1]) as file:
        assert len(file["keys"]) == 4
    assert make(tmp_path / "c").images == 24


def test_an_empty_cache_binds_nobody(tmp_path: Path, identity: CacheIdentity, make: Make) -> None:
    (tmp_path / "bad.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(InputError, match="cannot read"):
        make(tmp_path / "c", identity=replace(identity, data_fraction=0.5), tars=[tmp_path / "bad.tar"])
    assert make(tmp_path / "c").images == 24


def test_a_shard_that_was_removed_is_made_again(tmp_path: Path, cache_dir: Path, make: Make) -> None:
    make(tmp_path)
    shard_paths(tmp_path)[1].unlink()
    with pytest.raises(InputError, match="has lost a shard: run stage=precompute"):
        EmbeddingsCache(tmp_path)
    assert make(tmp_path).images == 24
    assert EmbeddingsCache(tmp_path).keys == EmbeddingsCache(cache_dir).keys


def test_shards_of_another_cache_are_refused(tmp_path: Path, identity: CacheIdentity, make: Make) -> None:
    make(tmp_path)
    (tmp_path / "cache.json").unlink()
    with pytest.raises(InputError, match=r"shard-00000-00000\.h5 is of another cache: SHA-256 of the"):
        make(tmp_path, identity=replace(identity, teacher_sha256="0" * 64))


def test_a_damaged_cache_json_is_named(tmp_path: Path, make: Make) -> None:
    (tmp_path / "cache.json").write_text('{"format": "sam-distill embeddings cache", "version": 1, "identity": {}}')
    with pytest.raises(InputError, match=r"cache\.json is damaged"):
        make(tmp_path)


def test_a_long_list_of_images_fits_into_a_shard(tmp_path: Path, sam: Sam, make: Make) -> None:
    images = [f"somewhere/far/away/sa_{n:06d}.tar" for n in range(5000)]
    listed = cache_identity(
        sam, "toy", teacher_dtype="float32", dtype="float16", jpeg_quality=95, images=images, fraction=1.0
    )
    assert make(tmp_path, identity=listed).images == 24
    other = cache_identity(
        sam, "toy", teacher_dtype="float32", dtype="float16", jpeg_quality=95, images=images[1:], fraction=1.0
    )
    with pytest.raises(InputError, match=r"data\.images: '5000 sources, SHA-256"):
        make(tmp_path, identity=other)


def test_no_readable_image_at_all_is_an_error(tmp_path: Path, scene_tar: Path, make: Make) -> None:
    tar = damaged_tar(tmp_path / "bad.tar", scene_tar, broken=20)
    with pytest.raises(InputError, match="no image could be read from"):
        make(tmp_path / "c", tar=tar)


def test_a_fraction_takes_a_stable_part(tmp_path: Path, cache_dir: Path, identity: CacheIdentity, make: Make) -> None:
    make(tmp_path, identity=replace(identity, data_fraction=0.5))
    half = EmbeddingsCache(tmp_path)
    assert 4 < len(half) < 20
    assert set(half.keys) < set(EmbeddingsCache(cache_dir).keys)
