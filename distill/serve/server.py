"""A port, and uvicorn behind it."""

import asyncio
import ipaddress
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from distill.serve.protocol import ImpatientProtocol
from students import InputError

Accept = Callable[[socket.socket], Awaitable[object]]
"""Serves one end of a pair of sockets, as if somebody had connected."""

KEEP_ALIVE = 30
"""Seconds that a connection may be silent between requests."""

LARGEST_HEADERS = 2**15


class Server(uvicorn.Server):
    """uvicorn, which ends in order when the system asks for it, and leaves the exit code to its caller.

    Args:
        app: what answers.
        stop_seconds: which requests at work have to end then.
        opened: is called once the port is open.
        rehearsal: is given a way to connect before it is.
    """

    def __init__(
        self,
        app: ASGIApp,
        stop_seconds: float,
        opened: Callable[[], None],
        rehearsal: Callable[[Accept], Awaitable[None]] | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=ImpatientProtocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=max(1, round(stop_seconds)),
            h11_max_incomplete_event_size=LARGEST_HEADERS,
        )
        super().__init__(config)
        self._opened, self._rehearsal = opened, rehearsal

    def serve_on(self, listener: socket.socket) -> None:
        """Serve until told to stop.

        Raises:
            InputError: the port has been taken meanwhile.
        """
        try:
            asyncio.run(self.serve([listener]))
        except OSError as error:
            if self.started:
                raise
            raise InputError(f"the port cannot be opened: {error.strerror}") from error

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Rehearse, then open the port."""
        await super().startup([])
        loop = asyncio.get_running_loop()

        def connection() -> asyncio.Protocol:
            return ImpatientProtocol(self.config, self.server_state, self.lifespan.state)

        if self._rehearsal is not None:
            await self._rehearsal(lambda side: loop.connect_accepted_socket(connection, side))
        for listener in sockets or []:
            self.servers.append(await loop.create_server(connection, sock=listener, backlog=self.config.backlog))
        self._opened()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the server in order; a second SIGINT does not wait for requests at work."""
        if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
            yield
            return

        def told(number: int, frame: FrameType | None) -> None:
            self.force_exit = self.should_exit and number == signal.SIGINT
            self.should_exit = True

        before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which nobody can connect to before it is listened at.

    Raises:
        InputError: there is no such address here, or another program has the port.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        family, kind, protocol, _, address = found
        # With its protocol named: asyncio sends small pieces at once only if it is, and a click takes 40 ms more.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise InputError(f"host={host} port={port} cannot be had: {error.strerror or error}") from error
    return listener


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's alone, however it is called."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host or None, 0, flags=socket.AI_PASSIVE)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in found)


def url_of(listener: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # all addresses, and no place to go to
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
