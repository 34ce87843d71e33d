"""Who may ask, and what is answered whatever happens: around all routes."""

import asyncio
import hmac
import logging
import math
import time
from collections.abc import Collection, Mapping

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distill.serve.errors import Gone, Refused
from distill.serve.messages import Error, Reason
from distill.serve.metrics import Metrics

log = logging.getLogger("distill.serve")

PRIVATE = ("/v1/", "/metrics")
"""What begins like this needs the token, where there is one."""

MOST_DROPPED_BYTES, MOST_DROPPED_SECONDS = 64 * 2**20, 3.0
"""Of the body of a request that is refused: a client that is still sending hears nothing."""

STOPPING = Refused(503, "stopping", "the server was told to end", retry_after=5)

HUNG_UP = 499
"""Counted where nobody waits for the answer, as nginx does."""

HEADERS = {
    # A page of these is isolated, so that it may use threads; and nobody else's page can have it in a frame.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "no-referrer",
}


def host_name(text: str) -> str:
    """A host as a header or a setting says it: in small letters, without its port, IPv6 in brackets."""
    text = text.strip().lower()
    if text.startswith("["):
        return text.partition("]")[0] + "]"
    return f"[{text}]" if text.count(":") > 1 else text.partition(":")[0]


class Guard:
    """Around an application: host, origin and token are looked at first; what goes wrong becomes an answer in JSON that
    tells nothing of this machine, and what is unexpected also goes to the log.

    Args:
        app: has the routes.
        metrics: counts requests.
        token: that requests for `PRIVATE` have to show; None: none.
        hosts: what the header Host may say, whatever the port; None: anything.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, token: str | None, hosts: Collection[str] | None) -> None:
        self.app, self.metrics = app, metrics
        self.token = token.encode() if token is not None else None
        self.hosts = {host_name(name) for name in hosts} if hosts is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, exchange = time.perf_counter(), _Exchange(receive, send)
        scope["app"] = self  # without which the router answers 404 itself, in plain text
        status = HUNG_UP
        try:
            try:
                self._admit(scope["path"], Headers(scope=scope))
                await self.app(scope, exchange.receive, exchange.send)
            except asyncio.CancelledError:  # by uvicorn, which has waited for as long as it was to
                if not exchange.status:
                    await self._refuse(STOPPING, {"Connection": "close"}, scope, exchange)
            except Exception as error:
                await self._answer(error, scope, exchange)
            status = exchange.status
        except (Gone, ClientDisconnect):
            exchange.status = HUNG_UP
        finally:
            self.metrics.answered(scope["path"], status, time.perf_counter() - started)

    def _admit(self, path: str, headers: Headers) -> None:
        """Raise `Refused` unless a request may be served."""
        host = headers.get("host", "")
        if self.hosts is not None and host_name(host) not in self.hosts:
            # A page elsewhere whose name has been pointed at this machine (DNS rebinding).
            raise Refused(403, "unknown_host", "the server does not go by this name (serve.hosts)")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise Refused(403, "other_origin", "pages of other sites are not served")
        if self.token is not None and path.startswith(PRIVATE):
            kind, _, shown = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(shown.strip().encode("utf-8", "replace"), self.token)
            if kind.lower() != "bearer" or not right:
                raise Refused(401, "token", "the bearer token is missing or wrong")

    async def _answer(self, error: Exception, scope: Scope, exchange: "_Exchange") -> None:
        """Tell the client what went wrong."""
        if isinstance(error, Gone | ClientDisconnect):
            raise error
        if isinstance(error, HTTPException):
            what = "there is no such path" if error.status_code == 404 else "this is not done there"
            refused = Refused(error.status_code, {404: "not_found", 405: "method"}.get(error.status_code, "http"), what)
            extra: Mapping[str, str] = error.headers or {}
        elif isinstance(error, Refused):
            refused, extra = error, {}
        else:
            log.exception("%s %s", scope["method"], scope["path"][:100], exc_info=error)
            refused, extra = Refused(500, "internal", "the server could not do this; its log says why"), {}
        if exchange.status:
            raise error  # the answer had begun: the connection ends
        headers = dict(extra)
        if not await exchange.drop_body(scope):
            headers["Connection"] = "close"
        await self._refuse(refused, headers, scope, exchange)

    async def _refuse(self, refused: Refused, headers: dict[str, str], scope: Scope, exchange: "_Exchange") -> None:
        headers["Cache-Control"] = "no-store"
        if refused.retry_after is not None:
            headers["Retry-After"] = str(math.ceil(refused.retry_after))
        if refused.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        response = Response(_as_json(refused), refused.status, headers, "application/json")
        await response(scope, exchange.receive, exchange.send)


class _Exchange:
    """A request and its answer, as far as they are."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.status = 0
        self._more = True

    async def receive(self) -> Message:
        message = await self._receive()
        self._more = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message).update(HEADERS)
        await self._send(message)

    async def drop_body(self, scope: Scope) -> bool:
        """Read what a refused request still sends, within limits; returns whether that was all."""
        headers = Headers(scope=scope)
        if not self._more or ("content-length" not in headers and "transfer-encoding" not in headers):
            return True
        if "expect" in headers:  # it waits to hear whether it may send
            return False
        try:
            await asyncio.wait_for(self._drop(), MOST_DROPPED_SECONDS)
        except asyncio.TimeoutError:
            return False
        return not self._more

    async def _drop(self) -> None:
        dropped = 0
        while self._more and dropped < MOST_DROPPED_BYTES:
            message = await self.receive()
            dropped += len(message.get("body", b""))
            if message["type"] == "http.disconnect":
                raise Gone


def _as_json(refused: Refused) -> bytes:
    return msgspec.json.encode(Error(Reason(refused.code, refused.message)))
