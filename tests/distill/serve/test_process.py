"""The stage as a user runs it: a process that says where it is, shares its run with others, and ends in order."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from distill.main import main
from distill.serve.server import bind
from embeddings_cache.system import sole_user
from exports import SIZE, small_student
from serving import Client, in_base64, scene
from students.checkpoints import save_student
from support import ROOT, Cli


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What serves a small student."""
    folder = tmp_path_factory.mktemp("served")
    save_student(folder / "small.safetensors", small_student(), {"steps": "80"})
    return [
        "stage=serve",
        f"checkpoint={folder / 'small.safetensors'}",
        f"run_dir={folder / 'run'}",
        f"cache.dir={folder / 'cache'}",
        "teacher.name=toy",
        f"image_size={SIZE}",
        "port=0",
    ]


@contextmanager
def serving(words: list[str], **environment: str) -> Iterator[tuple[subprocess.Popen[str], Client, list[str]]]:
    """A server, a client, and the lines that it has said."""
    command = [sys.executable, str(ROOT / "distill.py"), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )
    watch = threading.Timer(240, process.kill)
    watch.start()
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("serve: http"):
                break
        else:
            raise AssertionError("\n".join(lines))
        watch.cancel()
        yield process, Client(int(lines[-1].split()[1].rpartition(":")[2])), lines
    finally:
        watch.cancel()
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_server_makes_its_files_shares_its_run_and_ends_in_order(words: list[str]) -> None:
    with serving(words) as (process, client, lines):
        assert "repvit_m0_9" in lines[-1]
        assert "CPU" in lines[-1]
        assert "512 MB of embeddings" in lines[-1]
        run = Path(words[2].partition("=")[2])
        assert {file.name for file in (run / "serve").iterdir()} >= {"encoder.onnx", "decoder_batch.onnx"}
        assert not (run / "export").exists()
        assert (run / "recipe.yaml").exists()
        with sole_user(run), serving(words) as (other, second, said):  # while another run holds the directory
            assert any("is current" in line for line in said)
            assert second.embed(scene(0)) == client.embed(scene(0))
            other.send_signal(signal.SIGINT)
            assert other.wait(60) == 0
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(client.post, "/v1/everything", {"image": in_base64(scene(0)), "points_per_side": 20})
            while client.metric('sam_queue{kind="everything"}') != 1:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            status, answer = asked.result()  # what was at work has ended, and was answered
            assert (status, sorted(answer)) == (200, ["height", "id", "masks", "width"])
        assert process.wait(60) == 0
        with pytest.raises(ConnectionRefusedError):
            client.ask("GET", "/health")


@pytest.mark.slow
@pytest.mark.parametrize("more", [["host=::1"], ["serve.hosts=[sam.example:8000]", "host=localhost"]])
def test_a_server_starts_by_whatever_name(words: list[str], more: list[str]) -> None:
    if "host=::1" in more and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with serving([*words, *more]) as (_, _, lines):
        assert lines[-1].startswith("serve: http://")
        host = lines[-1].split()[1].removeprefix("http://")
        with urlopen(f"http://{host}/health", timeout=30) as answer:
            assert answer.status == 200


@pytest.mark.slow
def test_work_that_does_not_end_is_left_when_time_is_up(words: list[str]) -> None:
    with serving([*words, "serve.stop_seconds=1"]) as (process, client, _):
        with ThreadPoolExecutor(1) as threads, client.connect() as silent:
            asked = threads.submit(
                client.post, "/v1/everything", {"image": in_base64(scene(0, (900, 1200))), "points_per_side": 64}
            )
            silent.sendall(b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n")
            silent.sendall(b"Content-Length: 9\r\n\r\n")
            while client.metric('sam_queue{kind="everything"}') != 1:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            status, answer = asked.result()
            assert (status, answer["error"]["code"]) == (503, "stopping")
        assert process.wait(30) == 0


def test_the_token_is_in_no_file_and_no_line(words: list[str], tmp_path: Path) -> None:
    token = "0123456789-secret-token"
    words = [*words, "serve.backend=torch", f"run_dir={tmp_path}"]
    with serving(words, SAM_DISTILL_TOKEN=token) as (process, client, lines):
        assert "with a token" in lines[-1]
        assert "PyTorch" in lines[-1]
        status, headers, _ = client.ask("POST", "/v1/embed", scene(0), {"Content-Type": "image/png"})
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        shown = {"Content-Type": "image/png", "Authorization": f"Bearer {token}"}
        assert client.ask("POST", "/v1/embed", scene(0), shown)[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert token not in "\n".join([*lines, process.stdout.read()])  # type: ignore[union-attr]
        assert not [file for file in tmp_path.rglob("*") if file.is_file() and token.encode() in file.read_bytes()]


@pytest.mark.parametrize(
    ("also", "line"),
    [
        (["host=0.0.0.0"], "host=0.0.0.0 can be reached from other machines"),
        (["host=no.such.name.invalid"], "can be reached from other machines"),
        (["serve.token_file=/none"], "serve.token_file=/none cannot be read: No such file or directory"),
        (["serve.backend=tvm"], "serve.backend=tvm is not known; known: onnx, torch"),
        (["serve.queue=0"], "serve.queue=0 is less than 1"),
        (["serve.seconds=0"], "serve.seconds=0.0 is not above 0"),
        (["port=70000"], "port=70000 is more than 65535"),
        (["checkpoint=/none.safetensors"], "no student at /none.safetensors"),
        (["teacher.name=vit_h"], "needs the teacher's mask decoder"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    also: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SAM_DISTILL_TOKEN", raising=False)
    given = {word.partition("=")[0]: word for word in [*words, *also]}
    assert main(list(given.values())) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


def test_several_processes_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2
    assert "stage=serve is one process" in capsys.readouterr().err


def test_a_taken_port_is_one_line_before_files_are_made(words: list[str], tmp_path: Path, cli: Cli) -> None:
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        result = cli(*words[:-1], f"port={port}", f"run_dir={tmp_path / 'run'}")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        f"distill.py: host=127.0.0.1 port={port} cannot be had: Address already in use"
    )
    assert not (tmp_path / "run" / "serve").exists()


def test_small_pieces_are_sent_at_once() -> None:
    with bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # without which asyncio does not set TCP_NODELAY


def test_without_the_extra_the_line_says_how_to_get_it(words: list[str], cli: Cli, tmp_path: Path) -> None:
    program = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'uvicorn' else find(name, *rest)\n"
        "from distill.main import main; sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert (
        result.stderr.splitlines()[-1]
        == "distill.py: stage=serve needs uvicorn: pip install '.[serve]' where it was cloned"
    )


def test_the_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for key in ("host=127.0.0.1", "port=8000", "serve.cache_mb=512", "serve.token_file=null"):
        assert key in said
