"""The function that CVAT calls, by way of Nuclio: a frame comes in, its embedding goes out, and the decoder in the
annotator's browser makes masks of it. README.md says how it is deployed, and what the environment variables set.
"""

import base64
import json
import os
from pathlib import Path
from typing import Any

from segmenter import BadPicture, Segmenter

EMBEDDING = [256, 64, 64]
"""The one shape that CVAT's pages take: channels, rows, columns."""


class BadRequest(ValueError):
    """What is wrong with a request, in words for whoever sent it."""


def init_context(context: Any) -> None:
    """Open the files and run them once; Nuclio calls this before the first event, in each worker.

    Raises:
        RuntimeError: encoder and decoder do not belong together, or are not of the shape that CVAT takes.
        ValueError: a setting is no number.
    """
    wanted = [name.strip() for name in os.environ.get("SAM_PROVIDERS", "").split(",") if name.strip()]
    cache_mb = setting("SAM_CACHE_MB", 128)
    segmenter = Segmenter(Path(__file__).parent, wanted or None, int(setting("SAM_THREADS", 0)), cache_mb)
    made = segmenter.encoder.get_outputs()[0].shape
    if made[1:] != EMBEDDING:
        raise RuntimeError(f"encoder.onnx makes embeddings of {made}, CVAT takes (1, 256, 64, 64)")
    segmenter.warm_up()
    context.user_data.segmenter = segmenter
    context.logger.info(f"Model {segmenter.fingerprint} runs on {', '.join(segmenter.providers)}")
    if missing := [name for name in wanted if name not in segmenter.providers]:
        context.logger.warn(f"SAM_PROVIDERS names what is not there: {', '.join(missing)}")


def handler(context: Any, event: Any) -> Any:
    """Answer one request.

    Args:
        context: Nuclio's, after `init_context`.
        event: its body is JSON, `{"image": base64 of a JPEG, PNG ...}`. What CVAT sends beside it, such as clicks, is
            for functions that make masks themselves, and is not looked at.

    Returns:
        Status 200 and `{"blob": base64 of float32 (1, 256, 64, 64), little-endian}`, or 400 and `{"message": why not}`.
    """
    try:
        # CVAT's frames lie as its pages show them; an orientation that is left in one is not applied there either.
        embedding, _ = context.user_data.segmenter.look(picture_in(event.body), upright=False)
    except (BadRequest, BadPicture) as error:
        context.logger.warn(f"Refused: {error}")
        return respond(context, 400, {"message": str(error)})
    return respond(context, 200, {"blob": base64.b64encode(embedding.astype("<f4").tobytes()).decode()})


def picture_in(body: Any) -> bytes:
    """The encoded picture of a request.

    Args:
        body: a dictionary where Nuclio found JSON and parsed it, else what was sent.

    Raises:
        BadRequest: there is none in it.
    """
    if isinstance(body, bytes | bytearray | str):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BadRequest("the body is not JSON") from error
    image = body.get("image") if isinstance(body, dict) else None
    if not isinstance(image, str):
        raise BadRequest('the body has to be {"image": "a picture in base64"}')
    try:
        return base64.b64decode(image, validate=True)
    except ValueError as error:
        raise BadRequest(f"image is not base64: {error}") from error


def respond(context: Any, status: int, answer: dict[str, str]) -> Any:
    """An answer in JSON, as Nuclio takes it."""
    return context.Response(body=json.dumps(answer), headers={}, content_type="application/json", status_code=status)


def setting(name: str, default: float) -> float:
    """A number from the environment."""
    value = os.environ.get(name) or default
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{name}={value} is not a number") from None
