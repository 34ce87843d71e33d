"""ONNX Runtime for browsers: where it comes from, what is refused, and what is kept. The tarballs here are small, and
the registry is a server of this machine."""

import base64
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from browser import served
from distill.export import runtime
from distill.export.runtime import FILES, TARBALL, VERSION, browser_runtime, cache_folder
from distill.main import main
from students import InputError
from support import TINY, places

SAID: list[str] = []


def tarball(contents: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return held.getvalue()


def integrity(data: bytes) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()


WHOLE = {f"package/dist/{name}": name.encode() for name in FILES} | {"package/dist/ort.all.js": b"not asked for"}


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """A folder that npm's registry would hand out, with a good tarball."""
    place = tmp_path / "registry" / "onnxruntime-web" / "-"
    place.mkdir(parents=True)
    (place / TARBALL).write_bytes(tarball(WHOLE))
    return tmp_path / "registry"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SAM_DISTILL_ONNXRUNTIME_WEB", raising=False)
    monkeypatch.setattr(runtime, "INTEGRITY", integrity(tarball(WHOLE)))
    SAID.clear()


def refusal() -> str:
    with pytest.raises(InputError) as refused:
        browser_runtime(SAID.append)
    said = str(refused.value)
    assert len(said.splitlines()) == 1
    assert not cache_folder().exists()
    assert not list(cache_folder().parent.glob(".tmp-*"))
    return said


def test_it_is_downloaded_once(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(registry) as server:
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", server.address)
        folder = browser_runtime(SAID.append)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: name.encode() for name in FILES}
        assert len(server.asked) == 1
        assert f"{VERSION} from {server.address}" in SAID[0]
    assert browser_runtime(SAID.append) == folder  # the server is gone
    (folder / FILES[0]).unlink()
    with pytest.raises(InputError, match="cannot be downloaded"):
        browser_runtime(SAID.append)


def test_another_tarball_is_refused(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = registry / "onnxruntime-web" / "-" / TARBALL
    wrong.write_bytes(tarball({**WHOLE, f"package/dist/{FILES[0]}": b"something else"}))
    with served(registry) as server:
        monkeypatch.setenv("npm_config_registry", server.address)
        assert f"{TARBALL} is not onnxruntime-web {VERSION}: its SHA-512 is another one" in refusal()


def test_where_there_is_no_registry_a_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, registry: Path) -> None:
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    said = refusal()
    assert "Connection refused" in said
    assert f"put {TARBALL} into {cache_folder().parent}" in said
    assert "SAM_DISTILL_ONNXRUNTIME_WEB=FILE" in said
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "no address")
    assert "cannot be downloaded from no address" in refusal()
    (registry / "onnxruntime-web" / "-" / TARBALL).unlink()
    with served(registry) as server:
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", server.address)
        assert "HTTP Error 404" in refusal()


def test_a_tarball_that_is_given_needs_no_network(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    given = registry / "onnxruntime-web" / "-" / TARBALL
    monkeypatch.setenv("SAM_DISTILL_ONNXRUNTIME_WEB", str(registry / "gone.tgz"))
    assert "gone.tgz cannot be read: No such file or directory" in refusal()
    monkeypatch.setenv("SAM_DISTILL_ONNXRUNTIME_WEB", str(given))
    assert (browser_runtime(SAID.append) / FILES[-1]).read_bytes() == FILES[-1].encode()
    assert SAID == []


def test_a_tarball_in_the_cache_needs_no_network(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    cache_folder().parent.mkdir(parents=True)
    (registry / "onnxruntime-web" / "-" / TARBALL).rename(cache_folder().parent / TARBALL)
    assert (browser_runtime(SAID.append) / FILES[0]).exists()


@pytest.mark.parametrize("damage", ["a file is missing", "a link", "no tarball"])
def test_nothing_is_written_of_a_tarball_that_is_not_whole(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were npm's own tarball so: none of its names decides where anything is written."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as tar:
        for name in FILES[:-1]:
            tar.addfile(tarfile.TarInfo(f"package/dist/{name}"))
        if damage == "a link":
            link = tarfile.TarInfo(f"package/dist/{FILES[-1]}")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    data = b"no tarball" if damage == "no tarball" else held.getvalue()
    monkeypatch.setattr(runtime, "INTEGRITY", integrity(data))
    (tmp_path / "given.tgz").write_bytes(data)
    monkeypatch.setenv("SAM_DISTILL_ONNXRUNTIME_WEB", str(tmp_path / "given.tgz"))
    assert "given.tgz" in refusal()


@pytest.mark.slow
def test_without_it_an_export_says_so_in_a_line(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    student = f"checkpoint={finished_run / 'run' / 'student.safetensors'}"
    asked = [*TINY, *places(tmp_path, "gone.tar"), "stage=export", student]
    assert main([*asked, "export.formats=[web]"]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"distill.py: export.formats: web: onnxruntime-web {VERSION} cannot be downloaded from")
    assert not (tmp_path / "run" / "export" / "web").exists()
