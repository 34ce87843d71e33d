"""A machine-learning backend for Label Studio: keypoints and rectangles of an annotator in, brush regions out.

`python server.py --help` says how it is run, README.md how it is connected. It speaks Label Studio's HTTP interface for
backends itself and needs nothing but ONNX Runtime, NumPy and Pillow.
"""

import argparse
import base64
import binascii
import hmac
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any

from backend import Backend
from errors import Refused
from fetching import Pictures
from segmenter import BadPicture, Segmenter

MOST_REQUEST_BYTES = 256 * 2**20
"""A request for a prediction holds whole tasks, with pictures in `data:` URIs and the annotations that there are."""

MOST_DROPPED_BYTES = 32 * 2**20
"""Of the body of a request that is refused; a larger one is not waited for."""

IDLE_SECONDS = 60
"""How long a connection may keep silent."""

FAREWELL_SECONDS = 20
"""How long requests at work may take to end when the server is told to."""

log = logging.getLogger("label_studio")


class Server(ThreadingHTTPServer):
    """The endpoints of a backend on a port.

    Args:
        address: host and port; port 0: any that is free.
        backend: what answers.
        login: user and password that requests must show, if any.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], backend: Backend, login: tuple[str, str] | None = None) -> None:
        super().__init__(address, Handler)
        self.backend = backend
        self.login = login
        self.endpoints: dict[tuple[str, str], Callable[[dict[str, Any]], dict[str, Any]]] = {
            ("GET", "/"): backend.health,
            ("GET", "/health"): backend.health,
            ("GET", "/versions"): backend.versions,
            ("POST", "/setup"): backend.setup,
            ("POST", "/predict"): backend.predict,
            ("POST", "/webhook"): backend.learn,
            ("POST", "/train"): backend.learn,
        }
        self.at_work = 0
        self.changed = threading.Condition()

    def farewell(self) -> None:
        """Accept no more, and let requests at work end."""
        self.shutdown()
        self.server_close()
        with self.changed:
            self.changed.wait_for(lambda: not self.at_work, FAREWELL_SECONDS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke off is worth a line, and no more."""
        log.warning("%s: %s", client_address, sys.exc_info()[1])


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    timeout = IDLE_SECONDS
    read = False
    """Whether the body was."""
    server_version = "label-studio-backend"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer a GET."""
        self._answer()

    def do_POST(self) -> None:
        """Answer a POST."""
        self._answer()

    def _answer(self) -> None:
        started, reason = time.monotonic(), ""
        with self.server.changed:
            self.server.at_work += 1
        try:
            try:
                status, answer = 200, self._endpoint()(self._body())
            except (Refused, BadPicture) as error:
                status, reason = error.status if isinstance(error, Refused) else 422, str(error) or "refused"
            except (TimeoutError, ConnectionError):
                raise
            except Exception as error:  # of one request; the others must not suffer
                log.exception("%s", self.path)
                status, reason = 500, f"internal error: {type(error).__name__}"
            if reason:
                self._drop_body()
            self._send(status, self.server.backend.refusal(reason) if reason else answer, reason)
            took = time.monotonic() - started
            log.info(
                '%s "%s" %d in %.2f s%s',
                self.address_string(),
                self.requestline,
                status,
                took,
                reason and f": {reason}",
            )
        finally:
            with self.server.changed:
                self.server.at_work -= 1
                self.server.changed.notify_all()

    def _endpoint(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        if self.server.login is not None and not _shows(self.headers.get("Authorization", ""), self.server.login):
            raise Refused("user and password are missing or wrong", 401)
        path = self.path.partition("?")[0]
        endpoint = self.server.endpoints.get((self.command, path.rstrip("/") or "/"))
        if endpoint is None:
            raise Refused(f"there is no {self.command} {path[:100]}", 404)
        return endpoint

    def _body(self) -> dict[str, Any]:
        if self.command == "GET":
            return {}
        # A page that the annotator has open elsewhere cannot send this type without asking, and is not allowed to.
        if self.headers.get_content_type() != "application/json":
            raise Refused("Content-Type is not application/json", 415)
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 15:
            raise Refused("there is no Content-Length", 411)
        if int(length) > MOST_REQUEST_BYTES:
            raise Refused(f"{length} bytes are more than {MOST_REQUEST_BYTES}", 413)
        self.read = True
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refused(f"the request is no JSON: {error}") from error
        if not isinstance(body, dict):
            raise Refused("the request is no JSON object")
        return body

    def _drop_body(self) -> None:
        """Read what a refused request still sends: a client that is sending hears nothing."""
        length = self.headers.get("Content-Length", "")
        left = int(length) if length.isdecimal() and len(length) < 16 and not self.read else 0
        left = left if left <= MOST_DROPPED_BYTES else 0
        while left > 0 and (chunk := self.rfile.read(min(left, 2**16))):
            left -= len(chunk)
        self.close_connection = True

    def _send(self, status: int, answer: dict[str, Any], reason: str) -> None:
        body = json.dumps(answer).encode()
        # Label Studio drops the body of an error and notes the status line, so the reason stands in that too.
        line = " ".join(reason.split()).encode("ascii", "replace").decode()[:200]
        self.send_response(status, line or None)
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="backend"')
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: `_answer` writes the line, with what it took."""

    def log_message(self, format: str, *args: Any) -> None:
        """The base class's notes, by the module's log."""
        log.warning("%s %s", self.address_string(), format % args)


def _shows(header: str, login: tuple[str, str]) -> bool:
    """Whether an Authorization header shows a user and password."""
    kind, _, coded = header.partition(" ")
    try:
        shown = base64.b64decode(coded.strip(), validate=True) if kind.lower() == "basic" else b""
    except (ValueError, binascii.Error):
        return False
    return hmac.compare_digest(shown, ":".join(login).encode())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Segment what annotators click in Label Studio.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="From the environment: LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY, where pictures that were uploaded to "
        "Label Studio are fetched and a user's access token for that; BASIC_AUTH_USER and BASIC_AUTH_PASS, what Label "
        "Studio has to show, where both are set.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all, also other machines'")
    parser.add_argument("--port", type=int, default=9090, help="to listen at; 0: any that is free")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the ONNX files are")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="fetch pictures from there too; repeatable",
    )
    parser.add_argument("--max-mb", type=float, default=50, help="of a picture's file")
    parser.add_argument("--timeout", type=float, default=30, help="seconds for fetching a picture")
    parser.add_argument("--workers", type=int, default=2, help="predictions at a time")
    parser.add_argument("--threads", type=int, default=0, help="of one prediction; 0: as ONNX Runtime sees fit")
    parser.add_argument("--cache-mb", type=float, default=256, help="embeddings of pictures that are kept")
    found = parser.parse_args()
    for name in ("max_mb", "timeout", "workers"):
        if not getattr(found, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    return found


def main() -> int:
    """Serve until told to stop; the port opens once the model has run."""
    asked = arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stop = threading.Event()

    def told(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)
    environment = os.environ.get
    user, password = environment("BASIC_AUTH_USER"), environment("BASIC_AUTH_PASS")
    try:
        pictures = Pictures(
            environment("LABEL_STUDIO_URL"),
            environment("LABEL_STUDIO_API_KEY"),
            tuple(asked.allow_host),
            int(asked.max_mb * 2**20),
            asked.timeout,
        )
        segmenter = Segmenter(asked.folder, threads=asked.threads, cache_mb=asked.cache_mb)
        segmenter.warm_up()
        server = Server(
            (asked.host, asked.port),
            Backend(segmenter, pictures, asked.workers),
            (user, password) if user and password else None,
        )
    except Exception as error:  # ONNX Runtime's errors have no common class
        print(f"server.py: {error}", file=sys.stderr)
        return 1
    if not pictures.label_studio:
        log.warning("LABEL_STUDIO_URL is not set: pictures that were uploaded to Label Studio cannot be fetched")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address[:2]
    log.info("%s at http://%s:%s, on %s", segmenter.fingerprint, host, port, segmenter.providers[0])
    stop.wait()
    server.farewell()
    return 0


if __name__ == "__main__":
    sys.exit(main())
