import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from embeddings_cache.images.annotations import (
    bounding_box,
    center_point,
    decode_masks,
    decode_rle,
    encode_rle,
    usable_annotation,
)


def disk(height: int = 40, width: int = 60, x: int = 20, y: int = 15, radius: int = 8) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def test_masks_survive_rle() -> None:
    mask = disk()
    assert np.array_equal(decode_rle(json.loads(json.dumps(encode_rle(mask)))), mask)


def test_uncompressed_rle_is_read_too() -> None:
    mask = np.zeros((3, 4), bool)
    mask[1:, 1] = True
    # Column-major runs: 4 outside, 2 inside, 6 outside.
    assert np.array_equal(decode_rle({"size": [3, 4], "counts": [4, 2, 6]}), mask)


def test_center_point_is_deepest_inside() -> None:
    assert center_point(disk()) == (20.0, 15.0)
    crescent = disk(x=20, radius=12) & ~disk(x=26, radius=12)
    x, y = center_point(crescent)
    assert crescent[int(y), int(x)]
    # At the image's edge the mask ends: the middle of the picture is deepest, not its border.
    assert center_point(np.ones((5, 9), bool))[1] == 2.0


def test_bounding_box_agrees_with_coco() -> None:
    mask = disk()
    x0, y0, x1, y1 = bounding_box(mask)
    assert [x0, y0, x1 - x0, y1 - y0] == coco_mask.toBbox(
        encode_rle(mask) | {"counts": encode_rle(mask)["counts"].encode()}
    ).tolist()


def test_empty_masks_are_left_out() -> None:
    entries = [{"segmentation": encode_rle(mask)} for mask in (disk(), np.zeros((40, 60), bool))]
    assert len(list(decode_masks(json.dumps({"annotations": entries})))) == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"caption": "a dog"}',
        "[1, 2]",
        "3",
        '{"annotations": []}',
        '{"annotations": 5}',
        '{"annotations": [7]}',
        '{"annotations": [{"id": 1}]}',
        '{"annotations": [{"segmentation": null}]}',
        '{"annotations": [{"segmentation": [[1, 2, 3, 4, 5, 6]]}]}',
        '{"annotations": [{"segmentation": {"counts": "abc"}}]}',
    ],
)
def test_json_of_other_kinds_is_no_annotation(text: str) -> None:
    assert usable_annotation(text.encode(), (40, 60)) is None


def test_masks_must_have_the_images_size() -> None:
    text = json.dumps({"annotations": [{"segmentation": encode_rle(disk())}]})
    assert usable_annotation(text.encode(), (40, 60)) == text
    with pytest.raises(ValueError, match=r"annotated at \[40, 60\], the image has \[20, 30\]"):
        usable_annotation(text.encode(), (20, 30))


def test_what_is_not_json_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expecting"):
        usable_annotation(b"{not json", (1, 1))
