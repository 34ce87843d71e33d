import json
import tarfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import label

from embeddings_cache.images.annotations import decode_masks
from embeddings_cache.images.scenes import generate_scene, scene_count, write_scene_tar, write_scene_tars
from students import InputError


def test_scenes_follow_from_their_seed() -> None:
    first, again, other = (generate_scene(np.random.default_rng(seed), 128) for seed in (7, 7, 8))
    assert np.array_equal(first[0], again[0])
    assert not np.array_equal(first[0][:80, :80], other[0][:80, :80])
    assert max(first[0].shape) == 128


def test_masks_are_the_visible_parts() -> None:
    for seed in range(5):
        image, masks = generate_scene(np.random.default_rng(seed), 128)
        assert masks
        assert all(mask.shape == image.shape[:2] and mask.dtype == bool for mask in masks)
        assert np.sum(masks, axis=0).max() == 1  # no pixel belongs to two
        assert all(label(mask)[1] == 1 for mask in masks)  # each in one part
        assert all(mask.sum() >= mask.size / 400 for mask in masks)


def test_a_shape_in_pieces_gives_as_many_masks() -> None:
    """Two masks of one colour: some shapes are cut in two by another, and both parts are there."""
    cut = 0
    for seed in range(20):
        image, masks = generate_scene(np.random.default_rng(seed), 128)
        colours = [np.median(image[mask], axis=0) for mask in masks]
        cut += sum(np.abs(a - b).max() < 12 for a, b in combinations(colours, 2))
    assert cut >= 4


def test_a_mask_is_where_its_shape_is() -> None:
    """Colour changes more across a mask's outline than within it: the masks lie on the shapes."""
    within, across = [], []
    for seed in range(8):
        image, masks = generate_scene(np.random.default_rng(seed), 160)
        steps = np.abs(np.diff(image.astype(float), axis=1)).mean(axis=2)
        for mask in masks:
            edge = mask[:, 1:] != mask[:, :-1]
            across.append(steps[edge].mean())
            within.append(steps[~edge].mean())
    assert np.mean(across) > 3 * np.mean(within)


def test_tar_is_laid_out_as_sa1b(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    write_scene_tar(path, range(5, 7), 96)
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["sa_5.jpg", "sa_5.json", "sa_6.jpg", "sa_6.json"]
        content = json.loads(tar.extractfile("sa_5.json").read())
    assert content["image"]["image_id"] == 5
    assert content["image"]["file_name"] == "sa_5.jpg"
    masks = list(decode_masks(json.dumps(content)))
    assert len(masks) == len(content["annotations"])
    for entry, mask in zip(content["annotations"], masks, strict=True):
        assert entry["area"] == mask.sum()
        (x, y) = entry["point_coords"][0]
        assert mask[int(y), int(x)]
        x, y, width, height = (int(v) for v in entry["bbox"])
        assert mask[y : y + height, x : x + width].sum() == mask.sum()


def test_tars_are_made_once(tmp_path: Path) -> None:
    paths = write_scene_tars(tmp_path, 3, 96)
    before = Path(paths[0]).stat().st_mtime_ns
    assert write_scene_tars(tmp_path, 3, 96) == paths
    assert Path(paths[0]).stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir()] == [Path(paths[0]).name]


def test_scenes_spec() -> None:
    assert scene_count("scenes:12") == 12
    assert scene_count("sa_{0..3}.tar") == scene_count(["scenes:12"]) == 0
    for wrong in ("scenes:", "scenes:0", "scenes:many"):
        with pytest.raises(InputError, match="positive number"):
            scene_count(wrong)
