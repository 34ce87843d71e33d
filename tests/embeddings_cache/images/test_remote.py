"""What is not on this machine: fsspec's own memory file system, and web servers of several tempers on the loopback."""

import functools
import http.server
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from embeddings_cache.images import remote
from embeddings_cache.images.remote import open_remote
from embeddings_cache.images.sources import expand_sources
from pictures import ANNOTATION, encoded, read, write_tar
from students import InputError

Serve = Callable[..., str]


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves files; `breaks` says after how many bytes each answer breaks off, `ranges` whether a part may be had."""

    breaks: list[int] = []  # noqa: RUF012 - set by each test
    ranges = True
    refusals = 0
    asked: list[str] = []  # noqa: RUF012

    def refuse(self) -> bool:
        """Whether this is one of the requests that a server which restarts does not answer well."""
        type(self).refusals -= 1
        if refused := self.refusals >= 0:
            self.send_error(503)
        return refused

    def do_HEAD(self) -> None:
        if not self.refuse():
            super().do_HEAD()

    def do_GET(self) -> None:
        if self.refuse():
            return
        content = Path(self.translate_path(self.path))
        if content.is_dir():
            super().do_GET()
            return
        if not content.exists():
            self.send_error(404)
            return
        data, begin = content.read_bytes(), 0
        if self.ranges and (asked := self.headers.get("Range")):
            begin = int(asked.removeprefix("bytes=").partition("-")[0])
            self.asked.append(asked)
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        end = begin + self.breaks.pop(0) if self.breaks else len(data)
        self.wfile.write(data[begin:end])
        if end < len(data):
            self.close_connection = True
            self.connection.shutdown(2)

    def log_message(self, *arguments: object) -> None:
        return


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    running = []

    def start(breaks: tuple[int, ...] = (), ranges: bool = True, refusals: int = 0) -> str:
        own = {"breaks": list(breaks), "ranges": ranges, "refusals": refusals, "asked": []}
        handler = type("Handler", (Server,), own)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path)))
        server.asked = handler.asked  # type: ignore[attr-defined]
        running.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)


def big_tar(directory: Path) -> Path:
    """Some megabytes, so that a download can break off in the middle."""
    files = {f"sa_{n}.jpg": encoded(size=(40, 30)) for n in range(4)} | {
        "sa_0.json": ANNOTATION,
        "fill": bytes(3 << 20),
    }
    return Path(write_tar(directory / "sa_0.tar", files))


def test_http(tmp_path: Path, serve: Serve) -> None:
    url = serve()
    write_tar(tmp_path / "sa_0.tar", {"sa_0.jpg": encoded(), "sa_0.json": ANNOTATION})
    (sample,), skipped = read(f"{url}/sa_0.tar")
    assert (sample.key, sample.annotation, skipped) == ("sa_0", ANNOTATION.decode(), {})
    with pytest.raises(InputError, match=r"cannot read .*/missing\.tar: no such file, or none that one may read"):
        read(f"{url}/missing.tar")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_breaks_off_is_taken_up_again(ranges: bool, tmp_path: Path, serve: Serve) -> None:
    content = big_tar(tmp_path).read_bytes()
    url = serve(breaks=(1_000_000, 0, 1_500_000), ranges=ranges)
    with open_remote(f"{url}/sa_0.tar") as stream:
        assert stream.read() == content


def test_a_server_that_is_busy_at_first_is_asked_again(tmp_path: Path, serve: Serve) -> None:
    content = big_tar(tmp_path).read_bytes()
    with open_remote(f"{serve(refusals=5)}/sa_0.tar") as stream:
        assert stream.read() == content
    with pytest.raises(InputError, match=r"cannot read .*/sa_0\.tar: .*503.*tried 6 times"):
        read(f"{serve(refusals=99)}/sa_0.tar")


def test_one_that_keeps_breaking_off_stops_the_run(tmp_path: Path, serve: Serve) -> None:
    big_tar(tmp_path)
    url = serve(breaks=(100_000,) + (0,) * 20)
    with pytest.raises(InputError, match=r"cannot read .*/sa_0\.tar: .*tried 6 times"):
        read(f"{url}/sa_0.tar")


def test_a_web_servers_listing_is_globbed(tmp_path: Path, serve: Serve) -> None:
    url = serve()
    for n in range(3):
        write_tar(tmp_path / f"sa_{n}.tar", {f"sa_{n}.jpg": encoded()})
    (tmp_path / "README").write_text("no tar")
    assert expand_sources(f"{url}/sa_*.tar") == [f"{url}/sa_{n}.tar" for n in range(3)]
    assert [s.key for s in read(*expand_sources(f"{url}/sa_{{1..2}}.tar"))[0]] == ["sa_1", "sa_2"]
    with pytest.raises(InputError, match="nothing matches"):
        expand_sources(f"{url}/other_*.tar")


@pytest.fixture
def memory() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    for n in range(3):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz" if n == 2 else "w") as tar:
            info = tarfile.TarInfo(f"./sa_{n}.jpg")
            info.size = len(encoded())
            tar.addfile(info, io.BytesIO(encoded()))
        files.pipe(f"/bucket/sa_{n}.tar", packed.getvalue())
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def test_object_stores(memory: str) -> None:
    sources = expand_sources(f"{memory}/*.tar")
    assert len(sources) == 3
    samples, skipped = read(*sources)
    assert [sample.key for sample in samples] == ["sa_0", "sa_1", "sa_2"]
    assert skipped == {}
    with pytest.raises(InputError, match="nothing matches"):
        expand_sources(f"{memory}/*.zip")


def test_a_store_whose_package_is_missing_says_so() -> None:
    with pytest.raises(InputError, match=r"nowhere://bucket/\*\.tar: .*\(pip install -e '\.\[remote\]'\)"):
        expand_sources("nowhere://bucket/*.tar")
