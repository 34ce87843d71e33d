"""What a server does with many at once, and with what it cannot serve: it answers in JSON, and goes on."""

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.schema import Recipe, ServeRecipe
from distill.serve import exchange, protocol
from distill.serve.engines import OnnxEngine
from distill.serve.guard import HEADERS, host_name
from distill.serve.server import bind, is_loopback
from distill.serve.start import hosts_of
from distill.serve.token import token_of
from exports import SIZE
from serving import JSON, Client, engine, in_base64, running, scene, served_files
from students import InputError

HUGE = in_base64(b"\xff\xff\x61\x7f" * 1024)
"""Logits of 3·10³⁸."""

CLICK = [{"points": [[60, 50]]}]
EMBEDDING = 128 * (SIZE // 16) ** 2 * 4
"""Bytes of the small student's."""


class Held(OnnxEngine):
    """An engine that works only while it is let, and notes what it was given."""

    def __init__(self) -> None:
        super().__init__(served_files(), 1, 4)
        self.let = threading.Event()
        self.let.set()
        self.batches: list[int] = []
        self.decoded = 0

    def encode(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.batches.append(len(pictures))
        assert self.let.wait(60)
        return super().encode(pictures)

    def decode(self, *arguments: Any) -> Any:
        self.decoded += 1
        if threading.current_thread().name.startswith("everything"):
            assert self.let.wait(60)
        return super().decode(*arguments)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with running(ServeRecipe(body_mb=0.5, max_pixels=100_000, prompts=3, seconds=1.5)) as found:
        yield found


def until(holds: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to that"
        time.sleep(0.01)


def code(answer: Any) -> str:
    found = json.loads(answer) if isinstance(answer, bytes) else answer
    assert set(found) == {"error"}
    assert set(found["error"]) == {"code", "message"}
    return str(found["error"]["code"])


def test_a_picture_goes_by_its_content(client: Client) -> None:
    file = scene(4)
    first = client.embed(file)
    hits = client.metric("sam_embedding_hits_total")
    assert client.embed(file) == first
    assert client.embed(scene(5)) != first
    client.masks(id=first, prompts=CLICK)
    assert client.metric("sam_embedding_hits_total") == hits + 2


def test_the_least_recently_used_embedding_makes_room() -> None:
    with running() as client:
        assert client.service is not None
        client.service.embeddings.room = 2 * EMBEDDING
        first, second = client.embed(scene(0)), client.embed(scene(1))
        client.masks(id=first, prompts=CLICK)
        third = client.embed(scene(2))
        assert client.metric("sam_embeddings_bytes") == 2 * EMBEDDING
        for kept in (first, third):
            client.masks(id=kept, prompts=CLICK)
        status, answer = client.post("/v1/masks", {"id": second, "prompts": CLICK})
        assert (status, code(answer)) == (404, "unknown_id")
        assert "send the picture again" in answer["error"]["message"]
        client.masks(image=in_base64(scene(1)), prompts=CLICK)


def test_a_picture_that_many_ask_for_is_encoded_once() -> None:
    held = Held()
    with running(engine_at_work=held) as client, ThreadPoolExecutor(8) as threads:
        held.let.clear()
        same = [threads.submit(client.embed, scene(7)) for _ in range(6)]
        asked = threads.submit(client.masks, image=in_base64(scene(7)), prompts=CLICK)
        until(lambda: client.metric("sam_embedding_joined_total") == 6)
        held.let.set()
        assert len({each.result() for each in same}) == 1
        assert asked.result()
        assert held.batches == [1]


def test_pictures_that_wait_are_encoded_together() -> None:
    held = Held()
    with running(engine_at_work=held) as client, ThreadPoolExecutor(8) as threads:
        held.let.clear()
        first = threads.submit(client.embed, scene(0))
        until(lambda: held.batches == [1])
        others = [threads.submit(client.embed, scene(seed)) for seed in range(1, 7)]
        until(lambda: client.metric('sam_queue{kind="encode"}') == 7)
        time.sleep(0.2)  # what has been read waits for the encoder
        held.let.set()
        ids = [first.result(), *(each.result() for each in others)]
        assert len(set(ids)) == 7
        assert sum(held.batches) == 7
        assert max(held.batches) == 4
        for seed, id in enumerate(ids):  # each picture has got its own
            alone = client.masks(id=id, prompts=CLICK)
            values = engine(4).encode([np.asarray(_resized(scene(seed)))])[0]
            assert np.abs(client.service.embeddings.get(id).values - values).max() < 1e-4  # type: ignore[union-attr]
            assert alone


def _resized(file: bytes) -> np.ndarray:
    from distill.serve.pictures import read_picture
    from embeddings_cache.images import Reading

    return read_picture(file, SIZE, Reading()).pixels


def test_clicks_go_past_pictures_and_everything() -> None:
    held = Held()
    with running(engine_at_work=held) as client, ThreadPoolExecutor(8) as threads:
        known = client.embed(scene(0))
        held.let.clear()
        waiting = [threads.submit(client.embed, scene(seed)) for seed in (1, 2)]
        waiting.append(threads.submit(client.post, "/v1/everything", {"id": known}))
        until(lambda: client.metric('sam_queue{kind="everything"}') == 1 and len(held.batches) == 2)
        assert client.masks(id=known, prompts=CLICK)
        assert not any(each.done() for each in waiting)
        held.let.set()
        assert waiting[-1].result()[0] == 200


def test_a_full_queue_says_so_at_once_and_recovers() -> None:
    held = Held()
    with running(ServeRecipe(queue=2), held) as client, ThreadPoolExecutor(8) as threads:
        known = client.embed(scene(0))
        held.let.clear()
        waiting = [threads.submit(client.embed, scene(seed)) for seed in (1, 2)]
        until(lambda: client.metric('sam_queue{kind="encode"}') == 2)
        status, headers, body = client.ask("POST", "/v1/embed", scene(3), {"Content-Type": "image/png"})
        assert (status, code(body), headers["retry-after"]) == (503, "busy", "1")
        assert not any(each.done() for each in waiting)
        assert client.embed(scene(0)) == known  # this needs no encoder
        held.let.set()
        assert all(each.result() for each in waiting)
        assert client.embed(scene(3))


def test_what_nobody_waits_for_is_not_finished() -> None:
    held = Held()
    with running(engine_at_work=held) as client:
        known = client.embed(scene(0))
        held.let.clear()
        body = json.dumps({"id": known, "points_per_side": 64}).encode()
        with client.connect() as connection:
            connection.sendall(request_of("/v1/everything", body))
            until(lambda: client.metric('sam_queue{kind="everything"}') == 1)
        until(lambda: client.metric('sam_queue{kind="everything"}') == 0)
        decoded = held.decoded
        held.let.set()
        assert client.post("/v1/everything", {"id": known, "points_per_side": 2})[0] == 200
        assert held.decoded < decoded + 10, "all 4,096 points were decoded for nobody"


def request_of(path: str, body: bytes, kind: str = "application/json", length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def answer_to(client: Client, *parts: bytes, pause: float = 0.0) -> bytes:
    """All that comes back on a connection."""
    with client.connect() as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:
                break
            time.sleep(pause)
        found = b""
        try:
            while piece := connection.recv(65536):
                found += piece
                head, end, body = found.partition(b"\r\n\r\n")
                length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
                if end and length and len(body) >= int(length[0].split(b":")[1]):
                    break
        except OSError:
            pass
        return found


FILE = scene(0)
ID = "0" * 32

REFUSED: dict[str, tuple[dict[str, Any] | bytes, int, str]] = {
    "no JSON": (b"{", 400, "bad_json"),
    "no UTF-8": (b'{"id": "\xff"}', 400, "bad_json"),
    "nested deeply": (b'{"prompts": ' + b"[" * 100_000, 422, "bad_request"),
    "a list": (b"[]", 422, "bad_request"),
    "no prompts": ({"id": ID, "prompts": []}, 422, "bad_request"),
    "neither id nor image": ({"prompts": CLICK}, 422, "bad_request"),
    "id and image": ({"id": ID, "image": "", "prompts": CLICK}, 422, "bad_request"),
    "an id that is a path": ({"id": "../../../../etc/passwd", "prompts": CLICK}, 422, "bad_request"),
    "an unknown id": ({"id": ID, "prompts": CLICK}, 404, "unknown_id"),
    "an unknown key": ({"id": ID, "prompts": [{"point": [1, 2]}]}, 422, "bad_request"),
    "text for a number": ({"id": ID, "prompts": [{"points": [["1", 2]]}]}, 422, "bad_request"),
    "no base64": ({"image": "§", "prompts": CLICK}, 422, "bad_picture"),
    "a path for a picture": ({"image": "/etc/passwd", "prompts": CLICK}, 422, "bad_picture"),
    "an address for a picture": ({"image": "file:///etc/passwd", "prompts": CLICK}, 422, "bad_picture"),
    "an empty picture": ({"image": "", "prompts": CLICK}, 422, "bad_picture"),
    "half a picture": ({"image": in_base64(FILE[: len(FILE) // 2]), "prompts": CLICK}, 422, "bad_picture"),
    "neither point nor box": ({"image": in_base64(FILE), "prompts": [{}]}, 422, "bad_prompt"),
    "more labels than points": (
        {"image": in_base64(FILE), "prompts": [{"points": [[1, 1]], "labels": [1, 0]}]},
        422,
        "bad_prompt",
    ),
    "a point outside": ({"image": in_base64(FILE), "prompts": [{"points": [[191, 10]]}]}, 422, "bad_prompt"),
    "a point without end": (b'{"id": "%s", "prompts": [{"points": [[1e999, 1]]}]}' % ID.encode(), 0, ""),
    "a box from right to left": ({"image": in_base64(FILE), "prompts": [{"box": [90, 10, 20, 80]}]}, 422, "bad_prompt"),
    "an earlier mask of another size": (
        {"image": in_base64(FILE), "prompts": [{"points": [[9, 9]], "mask_input": "AAAA"}]},
        422,
        "bad_prompt",
    ),
    "an earlier mask of no numbers": (
        {"image": in_base64(FILE), "prompts": [{"points": [[9, 9]], "mask_input": in_base64(b"\xff" * 4096)}]},
        422,
        "bad_prompt",
    ),
    "an earlier mask beyond all logits": (
        {
            "image": in_base64(FILE),
            "prompts": [{"points": [[9, 9]], "mask_input": in_base64(b"\xff\xff\x61\x7f" * 1024)}],
        },
        422,
        "bad_prompt",
    ),
    "too many prompts": ({"image": in_base64(FILE), "prompts": CLICK * 4}, 422, "too_many_prompts"),
    "too many pixels": ({"image": in_base64(scene(0, (300, 400))), "prompts": CLICK}, 413, "too_many_pixels"),
    "too elongated": ({"image": in_base64(scene(0, (1, 900))), "prompts": CLICK}, 422, "bad_picture"),
    "too large": ({"image": "A" * 2**20, "prompts": CLICK}, 413, "too_large"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served_hears_why(client: Client, what: str) -> None:
    body, status, reason = REFUSED[what]
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    found, _, answer = client.ask("POST", "/v1/masks", sent, JSON)
    if status:
        assert (found, code(answer)) == (status, reason)
    assert 400 <= found < 500
    for of_this_machine in (b"/work", b"/home", b"/tmp", b"Traceback", b"site-packages", b"BytesIO"):
        assert of_this_machine not in answer
    assert client.ask("GET", "/health")[0] == 200


def test_a_body_without_a_length_has_limits_too(client: Client) -> None:
    head = (
        b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    answer = answer_to(client, head, *([chunk] * 12), b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    whole = b"%x\r\n%s\r\n0\r\n\r\n" % (len(FILE), FILE)
    assert answer_to(client, head, whole).startswith(b"HTTP/1.1 200 ")


def test_a_slow_upload_is_cut_off(client: Client) -> None:
    answer = answer_to(client, request_of("/v1/embed", b"\x89PNG", "image/png", length=1000))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"slow_upload" in answer
    assert client.metric("sam_bodies_bytes") == 0


def trickle(connection: socket.socket) -> None:
    """A byte ten times a second, for a minute."""
    for _ in range(600):
        connection.sendall(b"G")
        time.sleep(0.1)


def test_headers_that_trickle_are_cut_off(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "REQUEST_SECONDS", 0.5)
    for begin in (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with client.connect() as connection:
            connection.sendall(begin)
            with pytest.raises(ConnectionError):
                trickle(connection)


def test_whoever_does_not_read_the_answer_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(protocol, "READING_SECONDS", 0.5)
    (tmp_path / "index.html").write_bytes(b" " * 2**26)  # more than the buffers of both sides hold
    with running(page=tmp_path) as client, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", client.port))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(1.5)
        received = 0
        with suppress(ConnectionResetError):
            while piece := connection.recv(2**20):
                received += len(piece)
        assert received < 2**26
        assert client.ask("GET", "/health")[0] == 200


def test_connections_have_a_limit(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MOST_CONNECTIONS", 5)
    connections = [client.connect() for _ in range(8)]
    time.sleep(0.2)
    refused = [each.recv(1000) for each in connections[-2:]]
    assert all(each.startswith(b"HTTP/1.1 503 ") for each in refused)
    for each in connections:
        each.close()
    until(lambda: client.ask("GET", "/health")[0] == 200)


def test_a_killed_upload_leaves_nothing(client: Client) -> None:
    for _ in range(5):
        with client.connect() as connection:
            connection.sendall(request_of("/v1/embed", FILE[:200], "image/png", length=len(FILE)))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, at once
    until(lambda: client.metric("sam_bodies_bytes") == 0)
    assert client.embed(FILE)


def test_bodies_together_have_a_limit() -> None:
    size = 2**18
    with running(ServeRecipe(body_mb=size / 2**20)) as client:
        connections = [client.connect() for _ in range(exchange.BODIES + 1)]
        for number, each in enumerate(connections[:-1], 1):
            each.sendall(request_of("/v1/embed", b"x" * (size - 1), "image/png", length=size))
            until(lambda held=number * (size - 1): client.metric("sam_bodies_bytes") == held)
        connections[-1].sendall(request_of("/v1/embed", b"x" * size, "image/png"))
        assert connections[-1].recv(100).startswith(b"HTTP/1.1 503 ")
        assert client.embed(scene(0))  # which is small
        for each in connections:
            each.close()
        until(lambda: client.metric("sam_bodies_bytes") == 0)


def test_what_is_no_http_is_answered(client: Client) -> None:
    answer = answer_to(client, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"bad_http"' in answer
    assert client.ask("GET", "/health")[0] == 200


def test_work_that_takes_too_long_is_given_up() -> None:
    held = Held()
    with running(ServeRecipe(seconds=1.0), held) as client:
        held.let.clear()
        status, headers, body = client.ask("POST", "/v1/embed", scene(0), {"Content-Type": "image/png"})
        assert (status, code(body)) == (503, "too_slow")
        assert "retry-after" in headers
        held.let.set()
        assert client.embed(scene(0))


class Broken(OnnxEngine):
    def decode(self, *arguments: Any) -> Any:
        if threading.current_thread().name.startswith("decoder"):
            raise RuntimeError("secret of /home/someone")
        return super().decode(*arguments)


def test_what_is_unexpected_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with running(engine_at_work=Broken(served_files(), 1, 4)) as client:
        status, answer = client.post("/v1/masks", {"image": in_base64(scene(0)), "prompts": CLICK})
        assert (status, code(answer)) == (500, "internal")
        assert "secret" not in json.dumps(answer)
        assert "secret of /home/someone" in caplog.text
        assert client.ask("GET", "/health")[0] == 200


def test_the_token_is_asked_for() -> None:
    token = "a-token-of-some-length"
    with running(token=token) as client:
        right = {"Authorization": f"Bearer {token}"}
        for path in ("/v1/embed", "/metrics", "/v1/nothing"):
            method = "GET" if path == "/metrics" else "POST"
            for shown in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {token}"}):
                status, headers, body = client.ask(method, path, b"", shown)
                assert (status, code(body), headers["www-authenticate"]) == (401, "token", "Bearer")
        assert client.ask("GET", "/metrics", headers=right)[0] == 200
        assert client.ask("POST", "/v1/embed", FILE, {**right, "Content-Type": "image/png"})[0] == 200
        for path in ("/health", "/docs", "/openapi.json"):
            assert client.ask("GET", path)[0] == 200


def test_names_and_sites_that_are_not_ours_are_refused(client: Client) -> None:
    good = f"localhost:{client.port}"
    for host, status in (
        (good, 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("localhost.evil.example:80", 403),
        ("", 403),
    ):
        assert client.ask("GET", "/health", headers={"Host": host})[0] == status, host
    for origin, status in ((f"http://{good}", 200), ("http://evil.example", 403), ("null", 403)):
        assert client.ask("GET", "/health", headers={"Host": good, "Origin": origin})[0] == status, origin
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    status, headers, _ = client.ask("OPTIONS", "/v1/masks", headers=preflight)
    assert status == 403
    assert not [name for name in headers if name.startswith("access-control")]
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""):
        status, _, body = client.ask("POST", "/v1/embed", FILE, {"Content-Type": kind})
        assert (status, code(body)) == (415, "content_type"), kind


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("localhost:8000", "localhost"),
        ("Sam.Example", "sam.example"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]:8000", "[::1]"),
        ("[::1]", "[::1]"),
        ("::1", "[::1]"),
        ("", ""),
    ],
)
def test_a_host_is_known_by_its_name_whatever_the_port(said: str, name: str) -> None:
    assert host_name(said) == name


def test_a_public_address_needs_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SAM_DISTILL_TOKEN", raising=False)
    assert token_of(Recipe()) is None
    assert hosts_of(Recipe(), None) == ["127.0.0.1", "[127.0.0.1]", "localhost", "127.0.0.1", "[::1]", "::1"]
    for host in ("0.0.0.0", "::", "", "192.0.2.7", "no.such.host.invalid"):
        assert not is_loopback(host)
        with pytest.raises(InputError, match="can be reached from other machines"):
            token_of(Recipe(host=host))
    file = tmp_path / "token"
    file.write_text("from-a-file-0123456789\n")
    monkeypatch.setenv("SAM_DISTILL_TOKEN", "from-the-environment")
    assert token_of(Recipe(host="0.0.0.0")) == "from-the-environment"
    assert token_of(Recipe(serve=ServeRecipe(token_file=str(file)))) == "from-a-file-0123456789"
    assert hosts_of(Recipe(host="0.0.0.0"), "token") is None
    for bad in ("short", "with spaces in it, and long", "ünïcode-token-of-length"):
        monkeypatch.setenv("SAM_DISTILL_TOKEN", bad)
        with pytest.raises(InputError, match="16 printable ASCII characters"):
            token_of(Recipe())
    with pytest.raises(InputError, match="No such file"):
        token_of(Recipe(serve=ServeRecipe(token_file=str(tmp_path / "none"))))


def test_a_port_that_is_taken_is_one_line() -> None:
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        with pytest.raises(InputError, match="Address already in use"):
            bind("127.0.0.1", listener.getsockname()[1])


def test_the_page_is_its_folder_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "web"
    page.mkdir()
    (tmp_path / "secret").write_text("secret")
    for name in ("index.html", "app.mjs", "ort.wasm", "encoder.onnx", "style.css"):
        (page / name).write_text(f"<p>{name}")
    (page / "link").symlink_to(tmp_path / "secret")
    with running(page=page) as client:
        kinds = {
            "/": "text/html",
            "/app.mjs": "text/javascript",
            "/ort.wasm": "application/wasm",
            "/encoder.onnx": "application/octet-stream",
            "/style.css": "text/css",
        }
        for path, kind in kinds.items():
            status, headers, _ = client.ask("GET", path)
            assert (status, headers["content-type"].partition(";")[0]) == (200, kind)
            assert {key.lower() for key in HEADERS} <= headers.keys()
        for path in (
            "/../secret", "/%2e%2e/secret", "/..%2fsecret", "//etc/passwd", "/%2fetc/passwd", "/link",
            "/web/../../secret", "/%00", "/app.mjs/../../secret", "/..\\secret", "/" + "a" * 5000, "/" + "a/" * 3000,
        ):  # fmt: skip
            status, _, body = client.ask("GET", path)
            assert (status, code(body)) == (404, "not_found"), path
        assert client.ask("POST", "/app.mjs", b"")[0] == 405


def test_a_run_without_a_page_says_how_it_is_made(client: Client) -> None:
    status, headers, body = client.ask("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"export.formats=[web]" in body
    assert b'href="/docs"' in body


def test_the_description_is_whole_and_loads_nothing(client: Client) -> None:
    _, _, body = client.ask("GET", "/openapi.json")
    described = json.loads(body)
    assert described["openapi"].startswith("3.")
    assert described["components"]["schemas"]["MasksRequest"]["properties"]["prompts"]["maxItems"] == 3
    status, headers, page = client.ask("GET", "/docs")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    text = page.decode()
    for path in described["paths"]:
        assert path in text
    for name, schema in described["components"]["schemas"].items():
        assert all(field in text for field in schema.get("properties", {})), name
    assert "src=" not in text
    assert "http://" not in text
    assert "https://" not in text


def test_metrics_count_requests_by_known_routes_alone(client: Client) -> None:
    for number in range(3):
        client.ask("GET", f"/nothing/{number}")
    _, headers, page = client.ask("GET", "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = page.decode().splitlines()
    assert any(line.startswith('sam_requests_total{route="other",status="404"}') for line in lines)
    assert not any("nothing" in line for line in lines)
    for name in ("sam_request_seconds_bucket", "sam_batch_size_bucket", "process_resident_memory_bytes"):
        assert any(line.startswith(name) for line in lines), name
