import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from embeddings_cache.images.annotations import decode_masks, usable_annotation
from embeddings_cache.images.polygons import CocoFile
from embeddings_cache.images.rle import encode_rle
from embeddings_cache.images.samples import Decoder, read_images
from embeddings_cache.images.sources import Share
from pictures import encoded
from students import InputError

SIZE = (60, 80)
STAR = [(40, 5), (50, 30), (75, 32), (52, 42), (60, 55), (40, 45), (20, 57), (30, 40), (4, 30), (32, 28)]


def drawn(corners: list[tuple[float, float]]) -> np.ndarray:
    """Pixels whose middle lies in a polygon, by Pillow, which draws it much larger."""
    image = Image.new("1", (SIZE[1] * 16, SIZE[0] * 16))
    ImageDraw.Draw(image).polygon([(16 * x, 16 * y) for x, y in corners], fill=1)
    return np.asarray(image)[8::16, 8::16]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def labelme(*shapes: dict[str, Any], size: tuple[int, int] = SIZE) -> bytes:
    return json.dumps(
        {"version": "5.4.1", "shapes": list(shapes), "imageHeight": size[0], "imageWidth": size[1], "imageData": None}
    ).encode()


def test_labelmes_shapes_become_masks() -> None:
    encoded_shapes = labelme(
        {"label": "star", "points": STAR, "shape_type": "polygon"},
        {"label": "box", "points": [[70, 50], [10, 20]], "shape_type": "rectangle"},
        {"label": "disc", "points": [[40, 30], [40, 45]], "shape_type": "circle"},
        {"label": "crack", "points": [[0, 0], [9, 9]], "shape_type": "line"},
    )
    star, box, disc = decode_masks(usable_annotation(encoded_shapes, SIZE, pytest.fail) or "")
    assert iou(star, drawn(STAR)) > 0.98
    expected = np.zeros(SIZE, bool)
    expected[20:50, 10:70] = True
    assert np.array_equal(box, expected)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    assert iou(disc, (rows - 30) ** 2 + (columns - 40) ** 2 <= 15**2) > 0.97


@pytest.mark.parametrize(
    ("shape", "size", "reason"),
    [
        ({"points": STAR}, (60, 81), r"annotated at \[60, 81\]"),
        ({"points": [[0, 0]], "shape_type": "point"}, SIZE, "no polygon"),
        ({"points": [[0, 0], [1, "x"], [3, 3]]}, SIZE, "no polygon"),
        ({"points": [[0, 0], [10**400, 1], [3, 3]]}, SIZE, "no polygon"),
        ({"points": [[0, 0], [1, float("nan")], [3, 3]]}, SIZE, "no numbers"),
    ],
)
def test_labelmes_that_cannot_be_used(shape: dict[str, Any], size: tuple[int, int], reason: str) -> None:
    told: list[str] = []
    assert usable_annotation(labelme(shape, size=size), SIZE, told.append) is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(told[0])


def test_a_polygon_far_outside_is_cut_off() -> None:
    shape = {"points": [[-1e12, -1e12], [1e12, -1e12], [1e12, 1e12], [-1e12, 1e12]]}
    (mask,) = decode_masks(usable_annotation(labelme(shape), SIZE, pytest.fail) or "")
    assert mask.all()


def coco(folder: Path) -> Path:
    """Two pictures of which one has a polygon in two parts and an RLE, the other nothing; one that is not there."""
    square = [[10, 10, 30, 10, 30, 30, 10, 30], [40, 40, 50, 40, 50, 50, 40, 50]]
    content = {
        "images": [
            {"id": 7, "file_name": "a.b.jpg", "height": 60, "width": 80},
            {"id": 8, "file_name": "c.jpg", "height": 60, "width": 80},
            {"id": 9, "file_name": "elsewhere.jpg", "height": 60, "width": 80},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "iscrowd": 0, "segmentation": square, "bbox": [10, 10, 40, 40]},
            {"id": 2, "image_id": 7, "iscrowd": 1, "segmentation": encode_rle(drawn(STAR))},
            {"id": 3, "image_id": 9, "iscrowd": 0, "segmentation": square},
        ],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("below", ["", "train2017"])
def test_one_coco_file_beside_a_folder(below: str, tmp_path: Path) -> None:
    (tmp_path / "images" / below).mkdir(parents=True)
    for name in ("a.b.jpg", "c.jpg"):
        (tmp_path / "images" / below / name).write_bytes(encoded(size=(80, 60)))
    listed = CocoFile(coco(tmp_path))
    samples = {s.key: s for s in read_images([Share(str(tmp_path / "images"))], decoder=Decoder(annotations=listed))}
    first, second = sorted(samples)
    parts, star = decode_masks(samples[first].annotation or "")
    expected = np.zeros(SIZE, bool)
    expected[10:30, 10:30] = expected[40:50, 40:50] = True
    assert np.array_equal(parts, expected)
    assert np.array_equal(star, drawn(STAR))
    assert samples[second].annotation is None
    assert (first in listed, second in listed) == (True, False)


def test_a_picture_that_is_listed_twice_has_all_its_masks(tmp_path: Path) -> None:
    path = coco(tmp_path)
    content = json.loads(path.read_text())
    content["images"].append({"id": 10, "file_name": "a.b.jpg", "height": 60, "width": 80})
    content["annotations"].append({"id": 4, "image_id": 10, "segmentation": encode_rle(drawn(STAR))})
    path.write_text(json.dumps(content))
    assert len(json.loads(CocoFile(path).annotation("a.b") or b"")["annotations"]) == 3
    content["images"][-1]["height"] = 61
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"a\.b\.jpg is there in two sizes"):
        CocoFile(path)


@pytest.mark.parametrize("content", ["{}", "[]", "nothing", '{"images": [{"id": 1}], "annotations": []}'])
def test_what_is_not_cocos_is_refused_in_a_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=r"data\.annotations=.*x\.json"):
        CocoFile(tmp_path / "x.json")
    with pytest.raises(InputError, match="No such file"):
        CocoFile(tmp_path / "y.json")
