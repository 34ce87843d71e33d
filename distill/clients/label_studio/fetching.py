"""A task's picture as bytes: from Label Studio, from hosts that are allowed, from the task itself, and nowhere else."""

import base64
import binascii
import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import OrderedDict
from typing import Any

from errors import Refused

CLOUD = ("azure-blob", "azure_spi", "gs", "s3")
"""Schemes of the storages whose files Label Studio hands out itself."""

ACCESS_SECONDS = 60
"""How long what a personal access token was exchanged for is used; Label Studio lets it live for minutes."""

KEPT_SECONDS = 300
KEPT_BYTES = 128 * 2**20
"""Of pictures that were fetched: the clicks on one follow each other."""


class Pictures:
    """Fetches pictures, with a limit on where from, how large and how long.

    Args:
        label_studio: where it is reached, as in `http://localhost:8080`; without, tasks have to hold whole URLs.
        api_key: a personal access token or a legacy token of one of its users; sent to Label Studio and nobody else.
        hosts: others that pictures may come from, as `host` or `host:port`.
        most_bytes: of one picture.
        timeout: seconds for one picture.

    Raises:
        ValueError: `label_studio` is no http(s) URL.
    """

    def __init__(
        self,
        label_studio: str | None = None,
        api_key: str | None = None,
        hosts: tuple[str, ...] = (),
        most_bytes: int = 50 * 2**20,
        timeout: float = 30,
    ) -> None:
        self.label_studio = (label_studio or "").rstrip("/")
        if self.label_studio and _origin(self.label_studio) is None:
            raise ValueError(f"{label_studio} is no http(s) URL")
        self.api_key = api_key
        self.hosts = frozenset(host.lower() for host in hosts)
        self.most_bytes = most_bytes
        self.timeout = timeout
        self._opener = urllib.request.build_opener(_Redirects(self))
        self._access: tuple[str, float] | None = None
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self._exchanging = threading.Lock()

    def fetch(self, where: str, task: Any = None) -> bytes:
        """The picture at a URL, at a path on Label Studio's host, or in a `data:` URI.

        Args:
            where: as the task's data says.
            task: its id, by which Label Studio finds a file of a cloud storage.

        Raises:
            Refused: it may not be fetched from there, is too large, or does not come.
        """
        if where[:5].lower() == "data:":
            return self._inline(where)
        url = self.url_of(where, task)
        with self._lock:
            since, kept = self._kept.get(url, (0.0, b""))
        if kept and time.monotonic() - since < KEPT_SECONDS:
            return kept
        picture = self._download(url)
        with self._lock:
            self._kept[url] = time.monotonic(), picture
            self._kept.move_to_end(url)
            while sum(len(each) for _, each in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return picture

    def url_of(self, where: str, task: Any = None) -> str:
        """The http(s) URL at which a picture is to be had."""
        scheme = where.partition(":")[0].lower() if "://" in where else ""
        if scheme in CLOUD and isinstance(task, int):
            coded = base64.urlsafe_b64encode(where.encode()).decode()
            where, scheme = f"/tasks/{task}/presign/?fileuri={coded}", ""
        if not scheme and where.startswith("/") and not where.startswith("//"):
            if not self.label_studio:
                raise Refused(f"{_shown(where)} is on Label Studio's host, and LABEL_STUDIO_URL is not set")
            path = urllib.parse.urlsplit(self.label_studio).path
            host = self.label_studio.removesuffix(path) if path and where.startswith(f"{path}/") else self.label_studio
            where = host + where
        return urllib.parse.quote(where, safe="%/:=&?#+!$,;'@()*[]")  # as browsers do with spaces and umlauts

    def allow(self, url: str) -> bool:
        """Whether a URL is Label Studio's own; for other hosts than the allowed ones, raise.

        Raises:
            Refused: the host is none of the allowed ones.
        """
        origin = _origin(url)
        if origin is None:
            raise Refused(f"{_shown(url)} is no http(s) URL", 403)
        if self.label_studio and origin == _origin(self.label_studio):
            return True
        _, host, port = origin
        if host in self.hosts or f"{host}:{port}" in self.hosts:
            return False
        raise Refused(f"pictures are not fetched from {host}:{port}; --allow-host permits it", 403)

    def authorise(self, request: urllib.request.Request) -> None:
        """Let a request through to an allowed host, with the key if that is Label Studio.

        Raises:
            Refused: the host is none of the allowed ones.
        """
        if self.allow(request.full_url) and self.api_key:
            request.add_unredirected_header("Authorization", self._authorization())

    def _authorization(self) -> str:
        """The header for the key: a personal access token is a JWT, and is exchanged for one that lives for minutes."""
        assert self.api_key is not None
        if self.api_key.count(".") != 2:
            return f"Token {self.api_key}"
        with self._exchanging:
            if self._access is None or time.monotonic() - self._access[1] > ACCESS_SECONDS:
                body = json.dumps({"refresh": self.api_key}).encode()
                request = urllib.request.Request(
                    f"{self.label_studio}/api/token/refresh/", body, {"Content-Type": "application/json"}
                )
                answer = json.loads(self._read(request))
                self._access = str(answer["access"]), time.monotonic()
            return f"Bearer {self._access[0]}"

    def _download(self, url: str) -> bytes:
        try:
            request = urllib.request.Request(url)
            self.authorise(request)
            return self._read(request)
        except urllib.error.HTTPError as error:
            hint = " (is LABEL_STUDIO_API_KEY right?)" if error.code in (401, 403) else ""
            raise Refused(f"{_shown(url)}: {error.code} {error.reason}{hint}", 424) from error
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise Refused(f"{_shown(url)} could not be fetched: {error or type(error).__name__}", 424) from error

    def _read(self, request: urllib.request.Request) -> bytes:
        """The body of an answer, no larger and no longer in coming than allowed."""
        until = time.monotonic() + self.timeout
        body = bytearray()
        with self._opener.open(request, timeout=self.timeout) as answer:
            while chunk := answer.read1(2**16):
                body += chunk
                if len(body) > self.most_bytes:
                    raise Refused(f"{_shown(request.full_url)} has more than {self.most_bytes:,} bytes", 413)
                if time.monotonic() > until:
                    raise TimeoutError(f"it took longer than {self.timeout:g} s")
        return bytes(body)

    def _inline(self, uri: str) -> bytes:
        if len(uri) > self.most_bytes * 4 / 3 + 1000:
            raise Refused(f"a data: URI has more than {self.most_bytes:,} bytes", 413)
        head, comma, body = uri.partition(",")
        try:
            if not comma:
                raise ValueError("it has no comma")
            plain = urllib.parse.unquote_to_bytes(body)
            return base64.b64decode(plain, validate=True) if head.lower().endswith(";base64") else plain
        except (ValueError, binascii.Error) as error:
            raise Refused(f"a data: URI is malformed: {error}") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to allowed hosts only; the key goes along where it was sent first, if that is Label Studio too."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def redirect_request(self, *arguments: Any) -> urllib.request.Request | None:
        following = super().redirect_request(*arguments)
        if following is not None and "Authorization" in arguments[0].unredirected_hdrs:
            self.pictures.authorise(following)
        elif following is not None:
            self.pictures.allow(following.full_url)
        return following


def _origin(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port of an http(s) URL; none for what is not one, and for URLs that clients read differently."""
    if re.search(r"[\x00-\x20\x7f\\]", url):
        return None
    try:
        parts = urllib.parse.urlsplit(url)
        usual = {"http": 80, "https": 443}[parts.scheme]
        port = parts.port or usual
    except (ValueError, KeyError):
        return None
    return (parts.scheme, parts.hostname, port) if parts.hostname and "@" not in parts.netloc else None


def _shown(url: str) -> str:
    """A URL for a message: without its query, which may be a signature."""
    return repr(url.partition("?")[0][:200])
