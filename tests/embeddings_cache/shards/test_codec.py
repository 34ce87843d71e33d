from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from caches import Make
from embeddings_cache.images.annotations import bounding_box, center_point
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.shards.codec import decode_embedding, encode_embedding
from embeddings_cache.shards.format import CacheIdentity
from embeddings_cache.shards.reader import EmbeddingsCache, shard_paths
from embeddings_cache.teacher.loading import load_teacher


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_int8_is_off_by_half_a_step_at_most() -> None:
    rng = np.random.default_rng(0)
    embedding = (rng.standard_normal((16, 8, 8)) * rng.uniform(0.01, 5, (16, 1, 1))).astype(np.float16)
    kept = encode_embedding(embedding, "int8")
    assert {name: values.dtype for name, values in kept.items()} == {"embeddings": np.int8, "scales": np.float32}
    wide = kept["embeddings"] * kept["scales"][:, None, None]
    assert (np.abs(wide - embedding) <= 0.5001 * kept["scales"][:, None, None]).all()
    assert (np.abs(kept["embeddings"]).max((1, 2)) == 127).all()
    assert decode_embedding(kept["embeddings"], kept["scales"]).dtype == np.float16


def test_a_channel_of_zeros_stays_zero() -> None:
    kept = encode_embedding(np.zeros((2, 4, 4), np.float16), "int8")
    assert not decode_embedding(kept["embeddings"], kept["scales"]).any()


def test_float16_is_kept_bit_for_bit() -> None:
    embedding = np.random.default_rng(0).standard_normal((3, 4, 4)).astype(np.float16)
    ((name, values),) = encode_embedding(embedding, "float16").items()
    assert (name, values.tobytes()) == ("embeddings", embedding.tobytes())
    assert decode_embedding(values, None) is values


@pytest.fixture(scope="module")
def int8_dir(tmp_path_factory: pytest.TempPathFactory, identity: CacheIdentity, make: Make) -> Path:
    directory = tmp_path_factory.mktemp("int8")
    make(directory, identity=replace(identity, dtype="int8"))
    return directory


def test_an_int8_cache_takes_half_and_keeps_the_direction(cache_dir: Path, int8_dir: Path) -> None:
    def stored(directory: Path, *names: str) -> int:
        total = 0
        for shard in shard_paths(directory):
            with h5py.File(shard) as file:
                total += sum(file[name].id.get_storage_size() for name in names)
        return total

    whole = stored(cache_dir, "embeddings")
    assert stored(int8_dir, "embeddings") <= 0.505 * whole
    # Here a channel has 8 × 8 values to a scale of 4 bytes; at 1024 px it has 64 × 64, and this is 0.5005.
    assert stored(int8_dir, "embeddings", "scales") <= 0.54 * whole
    ours, exact = EmbeddingsCache(int8_dir), EmbeddingsCache(cache_dir)
    assert ours.keys == exact.keys
    assert min(cosine(a.embedding, b.embedding) for a, b in zip(ours, exact, strict=True)) >= 0.999


@pytest.mark.parametrize("prompt", ["point", "box"])
def test_masks_from_int8_are_those_from_float16(prompt: str) -> None:
    """By the toy teacher at the size it was trained at, on scenes that it has not seen."""
    predictor, ious = SamPredictor(load_teacher("toy", None, 256)), []
    for number in range(1000, 1008):
        image, truths = generate_scene(np.random.default_rng([0, number]), 320)
        predictor.set_image(image)
        embedding = predictor.features[0].half().numpy()
        kept = encode_embedding(embedding, "int8")
        for truth in truths:
            masks = []
            for each in (embedding, decode_embedding(kept["embeddings"], kept["scales"])):
                predictor.features = torch.from_numpy(each)[None].float()
                if prompt == "box":
                    found, scores, _ = predictor.predict(box=np.array(bounding_box(truth)), multimask_output=False)
                else:
                    found, scores, _ = predictor.predict(np.array([center_point(truth)]), np.array([1]))
                masks.append(found[scores.argmax()])
            ious.append((masks[0] & masks[1]).sum() / max(1, (masks[0] | masks[1]).sum()))
    assert np.mean(ious) >= 0.99
