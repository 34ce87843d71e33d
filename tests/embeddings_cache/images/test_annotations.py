import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from embeddings_cache.images.annotations import bounding_box, center_point, decode_masks, usable_annotation
from embeddings_cache.images.rle import encode_rle


def disk(height: int = 40, width: int = 60, x: int = 20, y: int = 15, radius: int = 8) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


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
    told: list[str] = []
    assert usable_annotation(text.encode(), (40, 60), told.append) is None
    assert told == ["annotation not used: it lists no masks as SA-1B does"]


def test_captions_are_no_annotations_and_nothing_to_tell_of() -> None:
    assert usable_annotation(b'{"caption": "a dog"}', (40, 60), pytest.fail) is None


def test_masks_must_have_the_images_size() -> None:
    text = json.dumps({"annotations": [{"segmentation": encode_rle(disk())}]})
    told: list[str] = []
    assert usable_annotation(text.encode(), (40, 60), told.append) == text
    assert usable_annotation(text.encode(), (20, 30), told.append) is None
    assert told == ["annotation not used: annotated at [40, 60], the image has [20, 30] (height, width)"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_and_wide_text_are_read(encoding: str) -> None:
    text = json.dumps({"image": {"file_name": "café.jpg"}, "annotations": [{"segmentation": encode_rle(disk())}]})
    assert usable_annotation(text.encode(encoding), (40, 60), pytest.fail) == text


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"{not json", "not JSON: Expecting property name"),
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b'{"annotations": []}\n{"annotations": []}\n', "not JSON: Extra data"),
        ('{"caption": "ein Gr\u00fc\u00df"}'.encode("latin-1"), "not utf-8"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_what_cannot_be_read_is_told_of(encoded: bytes, reason: str) -> None:
    told: list[str] = []
    assert usable_annotation(encoded, (1, 1), told.append) is None
    assert len(told) == 1
    assert told[0].startswith("annotation not used: ")
    assert reason in told[0]


def test_a_mask_that_is_none_costs_itself() -> None:
    bad = {"size": [40, 60], "counts": "02"}
    entries = [{"id": 1, "segmentation": encode_rle(disk())}, {"id": 2, "segmentation": bad}]
    told: list[str] = []
    text = usable_annotation(json.dumps({"annotations": entries}).encode(), (40, 60), told.append)
    assert [entry["id"] for entry in json.loads(text or "")["annotations"]] == [1]
    assert told == ["a mask not used: an RLE of 2 pixels for 40×60"]
