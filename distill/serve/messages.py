"""What requests say and answers hold; msgspec checks the former and describes both for OpenAPI."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from distill.serve.errors import Refused
from distill.serve.pictures import ID_LENGTH

Coordinate = Annotated[float, Meta(description="in pixels of the picture")]
Point = tuple[Coordinate, Coordinate]
Box = tuple[Coordinate, Coordinate, Coordinate, Coordinate]
Format = Literal["rle", "png", "polygons"]
Id = Annotated[str, Meta(pattern=f"^[0-9a-f]{{{ID_LENGTH}}}$", description="a picture, as /v1/embed calls it")]
Base64 = Annotated[
    str, Meta(description="a file in base64; data: URIs are taken too", extra_json_schema={"contentEncoding": "base64"})
]
Share = Annotated[float, Meta(ge=0, le=1)]


class EmbedRequest(Struct, forbid_unknown_fields=True):
    """A picture. Instead of this, its file can be sent as it is, as `image/jpeg` or the like."""

    image: Base64


class Prompt(Struct, forbid_unknown_fields=True):
    """One object: clicks, a box around it, or both; and the mask of an earlier answer, which they correct."""

    points: Annotated[list[Point], Meta(max_length=64, description="clicks, x and y")] = []
    labels: (
        Annotated[list[Literal[0, 1]], Meta(description="1: on the object, 0: beside it; default: on it")] | None
    ) = None
    box: Annotated[Box, Meta(description="x0, y0, x1, y1 around the object")] | None = None
    mask_input: Annotated[str, Meta(description="`low_res` of a mask of an earlier answer")] | None = None


class MasksRequest(Struct, forbid_unknown_fields=True):
    """Prompts on a picture, each for one object. Either `id` or `image` says which."""

    prompts: Annotated[list[Prompt], Meta(min_length=1)]
    id: Id | None = None
    image: Base64 | None = None
    multimask: Annotated[bool, Meta(description="three masks a prompt, and not the best one alone")] = False
    format: Format = "rle"
    tolerance: Annotated[float, Meta(ge=0, le=100, description="pixels that a polygon may leave the outline")] = 0.5
    low_res: Annotated[bool, Meta(description="answer what `mask_input` takes, too")] = False


class EverythingRequest(Struct, forbid_unknown_fields=True):
    """All masks of a picture, as segment-anything's `SamAutomaticMaskGenerator` finds them, without crops. Either `id`
    or `image` says which. What is left out is as `predict.*` of the run's recipe."""

    id: Id | None = None
    image: Base64 | None = None
    points_per_side: Annotated[int, Meta(ge=1, le=64)] | None = None
    pred_iou_thresh: Share | None = None
    stability_score_thresh: Share | None = None
    box_nms_thresh: Share = 0.7
    format: Format = "rle"
    tolerance: Annotated[float, Meta(ge=0, le=100)] = 0.5


class Rle(Struct):
    """COCO's compressed run-length encoding, as pycocotools reads it."""

    size: Annotated[list[int], Meta(min_length=2, max_length=2, description="height, width")]
    counts: str


class Polygon(Struct):
    """An outline and the holes in it, each x0, y0, x1, y1, ..., in pixels; a pixel reaches from its number to the
    next."""

    outer: list[float]
    holes: list[list[float]]


class Mask(Struct, omit_defaults=True):
    """A mask of the picture's size, in one of three formats."""

    predicted_iou: Annotated[float, Meta(description="the decoder's own estimate")]
    area: Annotated[int, Meta(ge=0, description="pixels")]
    bbox: Annotated[list[float], Meta(min_length=4, max_length=4, description="x, y, width, height; zeros: empty")]
    rle: Rle | None = None
    png: Annotated[str, Meta(description="base64; 255 on the object, else 0")] | None = None
    polygons: list[Polygon] | None = None
    low_res: (
        Annotated[str, Meta(description="base64 of little-endian float32 logits, (S/4)², for `mask_input`")] | None
    ) = None
    point_coords: Annotated[list[Point], Meta(description="of /v1/everything: which click")] | None = None
    stability_score: float | None = None


class Embedded(Struct):
    """A picture whose embedding is kept for a while."""

    id: Id
    width: Annotated[int, Meta(ge=1)]
    height: Annotated[int, Meta(ge=1)]


class Masks(Struct):
    """A list of masks for each prompt, in their order: one, or three with `multimask`."""

    id: Id
    width: int
    height: int
    masks: list[list[Mask]]


class Everything(Struct):
    """All masks, those with the highest predicted IoU first."""

    id: Id
    width: int
    height: int
    masks: list[Mask]


class Health(Struct):
    """That the server is there, and what it serves."""

    status: Literal["ok"]
    student: str
    image_size: int
    backend: str


class Reason(Struct):
    """What went wrong: for programs, and for people."""

    code: str
    message: str


class Error(Struct):
    """A request that was not served."""

    error: Reason


def parse(body: bytes, kind: type[Any]) -> Any:
    """A request of a kind.

    Raises:
        Refused: it is none; says what is wrong with it, and where.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise Refused(422, "bad_request", str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, "bad_json", f"the request is no JSON: {error}") from error
