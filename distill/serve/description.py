"""What the server does, for programs (OpenAPI 3.1) and for people."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from distill.schema import ServeRecipe
from distill.serve.messages import (
    Embedded,
    EmbedRequest,
    Error,
    Everything,
    EverythingRequest,
    Health,
    Masks,
    MasksRequest,
)

JSON = "application/json"

ERRORS = {
    400: "The body is no JSON, or the request no HTTP.",
    401: "The bearer token is missing or wrong.",
    403: "The request calls the server by a name that it does not go by, or comes from another site's page.",
    404: "No embedding of this id is kept (any more): send the picture again.",
    408: "The request did not arrive in time.",
    413: "The body, or the picture in it, is too large.",
    415: "The body's Content-Type is none that is taken.",
    422: "The request is not as described here, or the picture cannot be read.",
    500: "The server could not do this; its log says why.",
    503: "There is too much to do, or this took too long; Retry-After says when to ask again.",
}

EMBED = """The picture is encoded unless its embedding is kept, and goes by the id from then on, until others have taken
its place: `404` then asks for it again. The id depends on the file alone."""

MASKS = """Masks of `SamPredictor`: after one click the best of three by predicted IoU, else the one for clear prompts.
Requests with an `id`, or with a picture whose embedding is kept, do not wait for pictures that are being encoded."""

EVERYTHING = """A grid of points over the picture, and of their masks those that the decoder believes in, that are
stable, and that do not repeat each other. Takes seconds, of a dozen megapixels a minute. One request at a time, and
clicks go past it."""


def openapi(health: Health, settings: ServeRecipe) -> dict[str, Any]:
    """The server's OpenAPI document."""
    kinds = [EmbedRequest, MasksRequest, EverythingRequest, Embedded, Masks, Everything, Health, Error]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schemas["MasksRequest"]["properties"]["prompts"]["maxItems"] = settings.prompts
    for name in ("MasksRequest", "EverythingRequest"):
        schemas[name]["oneOf"] = [_only(schemas[name], "id", "image"), _only(schemas[name], "image", "id")]
    file = {"schema": {"type": "string", "format": "binary"}}
    files = dict.fromkeys(("image/jpeg", "image/png", "application/octet-stream"), file)
    limits = (
        f"A request has {settings.body_mb:g} MB, a picture {settings.max_pixels:,} pixels and {settings.seconds:g} "
        f"seconds at most ({settings.everything_seconds:g} for everything)."
    )
    token: dict[str, Any] = {"security": [{"bearer": []}, {}]}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"Segment Anything with {health.student}",
            "version": "1",
            "description": f"Pictures and prompts in, masks out. {limits} Errors are JSON, `code` for programs.",
        },
        "paths": {
            "/v1/embed": {"post": _post("Encode a picture", EMBED, "EmbedRequest", "Embedded", files, (404,)) | token},
            "/v1/masks": {"post": _post("Segment what prompts name", MASKS, "MasksRequest", "Masks") | token},
            "/v1/everything": {
                "post": _post("Segment everything", EVERYTHING, "EverythingRequest", "Everything") | token
            },
            "/health": {"get": _get("That it is there, and what it serves", {JSON: {"schema": _named("Health")}})},
            "/metrics": {"get": _get("Numbers for Prometheus", {"text/plain": {"schema": {"type": "string"}}}) | token},
            "/openapi.json": {"get": _get("This document", {JSON: {"schema": {"type": "object"}}})},
            "/docs": {"get": _get("It as a page", {"text/html": {"schema": {"type": "string"}}})},
        },
        "components": {"schemas": schemas, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }


def docs_page(described: Mapping[str, Any]) -> str:
    """The document as a page that loads nothing else."""
    return _template("docs.html.jinja").render(api=described, kind_of=_kind_of)


def welcome_page(health: Health) -> str:
    """What `/` shows of a run without a page."""
    return _template("welcome.html.jinja").render(health=health)


def _template(name: str) -> Any:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["code"] = lambda text: Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))
    return environment.get_template(name)


def _post(
    title: str, text: str, takes: str, gives: str, files: Mapping[str, Any] | None = None, but: tuple[int, ...] = ()
) -> dict[str, Any]:
    body = {JSON: {"schema": _named(takes)}, **(files or {})}
    answers = {str(status): _error(what) for status, what in ERRORS.items() if status not in but}
    return {
        "summary": title,
        "description": " ".join(text.split()),
        "requestBody": {"required": True, "content": body},
        "responses": {"200": {"description": "Done.", "content": {JSON: {"schema": _named(gives)}}}, **answers},
    }


def _get(title: str, content: Mapping[str, Any]) -> dict[str, Any]:
    answers = {str(status): _error(ERRORS[status]) for status in (400, 401, 403, 500)}
    return {"summary": title, "responses": {"200": {"description": "Done.", "content": content}, **answers}}


def _error(what: str) -> dict[str, Any]:
    return {"description": what, "content": {JSON: {"schema": _named("Error")}}}


def _named(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _only(schema: Mapping[str, Any], given: str, other: str) -> dict[str, Any]:
    """One of two keys, and not the other."""
    kind = next(each for each in schema["properties"][given]["anyOf"] if each.get("type") != "null")
    return {"required": [given], "properties": {given: kind, other: {"type": "null"}}}


def _kind_of(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(_kind_of(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    kind = schema.get("type", "anything")
    if kind == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(_kind_of(each) for each in schema['prefixItems'])}]"
        return f"list of {_kind_of(schema['items'])}" if isinstance(schema.get("items"), dict) else "list"
    return str(kind)
