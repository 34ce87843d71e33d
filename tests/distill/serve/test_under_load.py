"""A server that many press, or that is sent anything: no wrong mask, no error, and it is there afterwards."""

import random
import re
import subprocess
import threading
import time
import venv
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from distill.benchmark.serve import ServeBenchmark, benchmark_serve
from distill.schema import ServeRecipe
from exports import SIZE, small_student
from serving import in_base64, running, scene
from students.checkpoints import save_student

pytestmark = pytest.mark.slow

SCHEMATHESIS = "schemathesis==4.32.5"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection,unsupported_method"
)
FILE = scene(0)


def test_clicks_of_many_are_right_and_memory_stays(tmp_path: Path) -> None:
    save_student(tmp_path / "small.safetensors", small_student(), {"steps": "80"})
    options = f"run_dir={tmp_path / 'run'} cache.dir={tmp_path / 'cache'} teacher.name=toy image_size={SIZE}"
    settings = ServeBenchmark(
        checkpoint=str(tmp_path / "small.safetensors"), options=options, seconds=20, pictures=20, overload=80
    )
    rows = {row["backend"]: row for row in benchmark_serve(settings)["rows"]}
    clicks = rows["16 clients"]
    assert clicks["clicks"] > 100
    assert (clicks["errors"], clicks["wrong_masks"]) == (0, 0)
    assert clicks["least_iou"] > 0.99
    assert clicks["memory_growth"] < 1.05
    overload = rows["overload, 80 clients"]
    assert overload["errors"] == 0


def test_ten_times_too_many_hear_so() -> None:
    """That they need not wait for it, `test_a_full_queue_says_so_at_once_and_recovers` shows."""
    statuses: Counter[int] = Counter()
    lock = threading.Lock()
    with running(ServeRecipe(queue=4)) as client:
        end = time.monotonic() + 8

        def work(number: int) -> None:
            sent = 0
            while time.monotonic() < end:
                sent += 1
                file = FILE + b"%d %d" % (number, sent)  # which nobody has sent before
                status, headers, _ = client.ask("POST", "/v1/embed", file, {"Content-Type": "image/png"})
                with lock:
                    statuses[status] += 1
                assert headers.get("retry-after") == ("1" if status == 503 else None)
                time.sleep(0.05)

        with ThreadPoolExecutor(40) as threads:
            for each in [threads.submit(work, number) for number in range(40)]:
                each.result()
        assert statuses.keys() == {200, 503}
        assert min(statuses.values()) > 10
        assert client.embed(FILE)
        assert client.masks(image=in_base64(FILE), prompts=[{"points": [[60, 50]]}])


def test_slow_clients_and_killed_ones_harm_nobody() -> None:
    """Whoever had to wait for the slow ones would wait until they are cut off."""
    cut_off = 3.0
    with running(ServeRecipe(seconds=cut_off)) as client:
        id = client.embed(FILE)
        stop = threading.Event()

        def trickle() -> int:
            cut = 0
            while not stop.is_set():
                with client.connect() as connection:
                    try:
                        connection.sendall(b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n")
                        connection.sendall(b"Content-Length: 100000\r\n\r\n")
                        for _ in range(random.choice((10, 600))):  # some go by themselves
                            connection.sendall(b"x")
                            if stop.wait(0.1):
                                break
                    except OSError:
                        cut += 1
            return cut

        with ThreadPoolExecutor(50) as threads:
            slow = [threads.submit(trickle) for _ in range(50)]
            took = []
            end = time.monotonic() + 10
            while time.monotonic() < end:
                began = time.monotonic()
                assert client.masks(id=id, prompts=[{"points": [[60, 50]]}])
                took.append(time.monotonic() - began)
            stop.set()
        assert sum(each.result() for each in slow) > 0
        assert sorted(took)[len(took) // 2] < cut_off / 2
        end = time.monotonic() + 60
        while client.metric("sam_bodies_bytes"):
            assert time.monotonic() < end
            time.sleep(0.1)


def test_a_thousand_random_bodies_of_its_own_description(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    done = subprocess.run(
        [programs / "pip", "install", "-q", SCHEMATHESIS], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        pytest.skip(f"cannot be installed: {done.stderr[-300:]}")
    with running(ServeRecipe(body_mb=1)) as client:
        address = f"http://127.0.0.1:{client.port}/openapi.json"
        options = ["-n", "300", "--seed", "1", "--checks", CHECKS, "--continue-on-failure"]
        found = subprocess.run(
            [programs / "schemathesis", "run", address, *options, "--phases", "examples,coverage,fuzzing"],
            capture_output=True, text=True, timeout=900, cwd=tmp_path,
        )  # fmt: skip
        assert found.returncode == 0, found.stdout[-5000:]
        cases = re.search(r"([\d,]+) generated, ([\d,]+) passed", found.stdout)
        assert cases is not None
        assert int(cases[1].replace(",", "")) >= 1000
        assert cases[1] == cases[2]
        assert client.embed(FILE)


def test_random_prompts_on_a_picture_are_answered_or_refused() -> None:
    choice = random.Random(0)

    def number() -> float | int:
        return choice.choice([choice.uniform(-20, 220), choice.randrange(-2, 200), 0, 150, 190, 1e308, -0.0, 5e-324])

    def prompt() -> dict[str, Any]:
        count = choice.choice([0, 1, 1, 1, 2, 5, 64, 65])
        made: dict[str, Any] = {"points": [[number() % 150, number() % 150] for _ in range(count)]}
        if choice.random() < 0.2:
            made["points"] = [[number(), number()] for _ in range(count)]
        if choice.random() < 0.5:
            made["labels"] = [choice.choice([0, 1]) for _ in range(count if choice.random() < 0.9 else count + 1)]
        if choice.random() < 0.4:
            made["box"] = [number() for _ in range(4)] if choice.random() < 0.5 else [10, 20, 90, 100]
        return made

    statuses: Counter[int] = Counter()
    with running() as client:
        id = client.embed(FILE)
        for _ in range(300):
            request = {
                "id": id,
                "prompts": [prompt() for _ in range(choice.randrange(1, 4))],
                "multimask": choice.random() < 0.3,
                "format": choice.choice(["rle", "png", "polygons"]),
                "tolerance": choice.choice([0, 0.5, 3, 100]),
            }
            status, answer = client.post("/v1/masks", request)
            statuses[status] += 1
            assert ("masks" if status == 200 else "error") in answer
        assert statuses.keys() == {200, 422}
        assert min(statuses.values()) > 30
