"""A teacher, and caches of the shared scenes."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from segment_anything.modeling import Sam

from caches import SIZE, Make
from embeddings_cache.precompute import cache_identity, precompute
from embeddings_cache.shards.format import CacheIdentity, CacheInfo
from embeddings_cache.teacher.loading import load_teacher


@pytest.fixture(scope="module")
def sam() -> Sam:
    return load_teacher("toy", None, SIZE)


@pytest.fixture(scope="module")
def identity(sam: Sam, scene_tar: Path) -> CacheIdentity:
    return cache_identity(
        sam, "toy", teacher_dtype="float32", dtype="float16", jpeg_quality=95, images=str(scene_tar), fraction=1.0
    )


@pytest.fixture(scope="module")
def make(sam: Sam, identity: CacheIdentity, scene_tar: Path, accelerator: Accelerator) -> Make:
    """Precompute the shared scenes, or another tar, into a directory; ten rows a shard."""

    def run(
        directory: Path,
        identity: CacheIdentity = identity,
        tar: Path = scene_tar,
        tars: list[Path] | None = None,
        **options: Any,
    ) -> CacheInfo:
        settings = {"batch_size": 5, "images_per_shard": 10, **options}
        return precompute(
            directory, sam, identity, lambda: [str(path) for path in tars or [tar]], accelerator, **settings
        )

    return run


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory, make: Make) -> Path:
    """A finished cache of the 24 scenes in three shards."""
    directory = tmp_path_factory.mktemp("cache")
    make(directory)
    return directory
