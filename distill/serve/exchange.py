"""A request's body, within limits; and work for a client, as long as there is one."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from distill.serve.errors import Gone, Refused, busy

Result = TypeVar("Result")

BODIES = 8
"""So many times the largest body are held in memory at once, of all requests together."""

SMALL_BODY = 2**16
"""Bytes of a request, clicks for instance, that is taken even so."""


class Bodies:
    """Reads bodies, and knows what all that are held take.

    Args:
        limit: bytes of one.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    @contextmanager
    def counted(self) -> Iterator["Body"]:
        """A body, whose bytes count as held until this ends."""
        body = Body(self)
        try:
            yield body
        finally:
            self.held -= body.size


class Body:
    """One that is read, piece by piece."""

    def __init__(self, bodies: Bodies) -> None:
        self.size = 0
        self._bodies = bodies

    async def read(self, request: Request, until: float) -> bytes:
        """All of it, whether or not the client said how long it is.

        Args:
            request: whose.
            until: when it must be there, in the loop's time.

        Raises:
            Refused: it is too large or too slow, or too many are held.
            Gone: the client hung up.
        """
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self._bodies.limit):
            raise self._too_large()
        pieces: list[bytes] = []
        try:
            await asyncio.wait_for(self._gather(request, pieces), until - asyncio.get_running_loop().time())
        except asyncio.TimeoutError:
            raise Refused(408, "slow_upload", "the request did not arrive in time") from None
        except ClientDisconnect:
            raise Gone from None
        return b"".join(pieces)

    async def _gather(self, request: Request, pieces: list[bytes]) -> None:
        async for piece in request.stream():
            self.size += len(piece)
            self._bodies.held += len(piece)
            if self.size > self._bodies.limit:
                raise self._too_large()
            if self.size > SMALL_BODY and self._bodies.held > BODIES * self._bodies.limit:
                raise busy("the requests at work take all the memory there is for them: try again in a moment")
            pieces.append(piece)

    def _too_large(self) -> Refused:
        return Refused(413, "too_large", f"a request has {self._bodies.limit / 2**20:g} MB at most")


async def while_connected(request: Request, until: float, work: Coroutine[Any, Any, Result]) -> Result:
    """What a coroutine comes to. It is cancelled when the client hangs up, or does not get its answer in time.

    Raises:
        Refused: time is up.
        Gone: the client hung up.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        left = until - asyncio.get_running_loop().time()
        await asyncio.wait((task, gone), timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise Gone
        raise Refused(503, "too_slow", "this took longer than a request may take", retry_after=5)
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
