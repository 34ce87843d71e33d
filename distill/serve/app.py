"""The routes."""

import asyncio
import base64
import binascii
import mimetypes
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from distill.serve.description import docs_page, openapi, welcome_page
from distill.serve.errors import Refused
from distill.serve.exchange import SMALL_BODY, Bodies, while_connected
from distill.serve.messages import EmbedRequest, EverythingRequest, Health, MasksRequest, parse
from distill.serve.metrics import CONTENT_TYPE
from distill.serve.service import Service

ROUTES = ("/v1/embed", "/v1/masks", "/v1/everything", "/health", "/metrics", "/openapi.json", "/docs", "/")

TYPES = {".mjs": "text/javascript", ".wasm": "application/wasm", ".onnx": "application/octet-stream"}
"""Of the page's files, which not every system knows."""

LOCKED_PAGE = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""What our own pages may load: nothing."""

Work = Callable[[bytes, bool], Coroutine[Any, Any, bytes]]
"""A request's body, and whether it is a picture's file and not JSON → the answer, JSON."""


def routes_of(service: Service, bodies: Bodies, health: Health, page: Path | None) -> ASGIApp:
    """What the server answers, to whoever may ask.

    Args:
        service: does the work.
        bodies: reads what is sent.
        health: what `/health` says.
        page: a folder that `/` shows; None: how it is made.
    """
    for suffix, kind in TYPES.items():
        mimetypes.add_type(kind, suffix)
    settings = service.settings

    async def embed(body: bytes, is_file: bool) -> bytes:
        encoded = body if is_file else await _decoded(service, body, EmbedRequest, "image")
        return msgspec.json.encode(service.embedded(await service.embed(encoded)))

    async def masks(body: bytes, is_file: bool) -> bytes:
        request, encoded = await _request(service, body, MasksRequest)
        embedding = service.kept(request.id) if encoded is None else await service.embed(encoded)
        return await service.masks(embedding, request)

    async def everything(body: bytes, is_file: bool) -> bytes:
        request, encoded = await _request(service, body, EverythingRequest)
        embedding = service.kept(request.id) if encoded is None else await service.embed(encoded)
        return await service.everything(embedding, request)

    def post(path: str, work: Work, seconds: float, files: bool = False) -> Route:
        async def endpoint(request: Request) -> Response:
            is_file = _is_file(request, files)
            now = asyncio.get_running_loop().time()
            with bodies.counted() as body:
                content = await body.read(request, now + settings.seconds)
                answer = await while_connected(request, now + seconds, work(content, is_file))
            return Response(answer, media_type="application/json", headers={"Cache-Control": "no-store"})

        return Route(path, endpoint, methods=["POST"])

    def get(path: str, content: Callable[[], bytes], kind: str) -> Route:
        async def endpoint(request: Request) -> Response:
            return Response(content(), media_type=kind, headers={"Cache-Control": "no-cache"})

        return Route(path, endpoint, methods=["GET"])

    described = openapi(health, settings)
    routes: list[BaseRoute] = [
        post("/v1/embed", embed, settings.seconds, files=True),
        post("/v1/masks", masks, settings.seconds),
        post("/v1/everything", everything, settings.everything_seconds),
        get("/health", lambda: msgspec.json.encode(health), "application/json"),
        get("/metrics", service.metrics.page, CONTENT_TYPE),
        get("/openapi.json", lambda: msgspec.json.encode(described), "application/json"),
        _shown("/docs", docs_page(described)),
    ]
    shown = Mount("/", Page(directory=page, html=True)) if page is not None else _shown("/", welcome_page(health))

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    return Router([*routes, shown], redirect_slashes=False, lifespan=lifespan)


class Page(StaticFiles):
    """A folder's files, and nothing else."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if "\0" in scope["path"]:
            raise Refused(404, "not_found", "there is no such path")
        await super().__call__(scope, receive, send)


def _shown(path: str, page: str) -> Route:
    async def endpoint(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": LOCKED_PAGE, "Cache-Control": "no-cache"})

    return Route(path, endpoint, methods=["GET"])


def _is_file(request: Request, files: bool) -> bool:
    """Whether a body is a picture's file, by its type, and not JSON. A page of another site cannot send either type
    without asking, and is not allowed to.

    Raises:
        Refused: it is neither.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return False
    if files and (kind.startswith("image/") or kind == "application/octet-stream"):
        return True
    wanted = "application/json" + (", image/jpeg and the like, or application/octet-stream" if files else "")
    raise Refused(415, "content_type", f"Content-Type is not {wanted}")


async def _decoded(service: Service, body: bytes, kind: type[Any], field: str) -> bytes:
    request = await _parsed(service, body, kind)
    return await _file(service, getattr(request, field))


async def _request(service: Service, body: bytes, kind: type[Any]) -> tuple[Any, bytes | None]:
    """A request, and the picture's file that it brings; None where it names one by its id.

    Raises:
        Refused: it does neither, or both.
    """
    request = await _parsed(service, body, kind)
    if (request.id is None) == (request.image is None):
        raise Refused(422, "bad_request", "a request has either `id` or `image`")
    return request, None if request.image is None else await _file(service, request.image)


async def _parsed(service: Service, body: bytes, kind: type[Any]) -> Any:
    # What is large would keep others waiting.
    return parse(body, kind) if len(body) <= SMALL_BODY else await service.in_thread("reader", parse, body, kind)


async def _file(service: Service, text: str) -> bytes:
    return _from_base64(text) if len(text) <= SMALL_BODY else await service.in_thread("reader", _from_base64, text)


def _from_base64(text: str) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise Refused(422, "bad_picture", "`image` is not base64") from None
