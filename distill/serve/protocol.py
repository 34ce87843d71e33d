"""HTTP as uvicorn speaks it, less patient: with clients that send no request, or do not read the answer."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10.0
"""From the first byte of a connection, or of a request after another, to the end of its headers."""

READING_SECONDS = 30.0
"""In which a client has to take something of an answer that is more than buffers hold."""

MOST_CONNECTIONS = 1000

FULL = b'{"error":{"code":"busy","message":"there are too many connections: try again in a moment"}}'
NO_HTTP = b'{"error":{"code":"bad_http","message":"this is no HTTP request"}}'


class ImpatientProtocol(H11Protocol):
    """One connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._until: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.write(_answer(b"503 Service Unavailable", FULL, b"Retry-After: 1\r\n"))
            transport.close()
            return
        self._expect("request", REQUEST_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        for what in list(self._until):
            self._came(what)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect("request", REQUEST_SECONDS)
        else:
            self._came("request")

    def pause_writing(self) -> None:
        """Buffers are full: the client does not read."""
        super().pause_writing()
        self._expect("reading", READING_SECONDS)

    def resume_writing(self) -> None:
        """It does."""
        self._came("reading")
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What is sent for what is no HTTP."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_answer(b"400 Bad Request", NO_HTTP))
        self.transport.close()

    def _expect(self, what: str, seconds: float) -> None:
        if what not in self._until and not self.transport.is_closing():
            self._until[what] = self.loop.call_later(seconds, self._give_up, what)

    def _came(self, what: str) -> None:
        if what in self._until:
            self._until.pop(what).cancel()

    def _give_up(self, what: str) -> None:
        self._until.pop(what, None)
        if what == "reading" or self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def _answer(status: bytes, body: bytes, headers: bytes = b"") -> bytes:
    size = str(len(body)).encode()
    head = b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json\r\nContent-Length: " + size
    return head + b"\r\nConnection: close\r\n" + headers + b"\r\n" + body
