"""A server under load: many clients click on the same pictures, and every answer is compared with `SamPredictor`."""

import io
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from distill.benchmark.machine import machine
from distill.evaluate.ious import mask_iou
from distill.export.subject import load_subject
from distill.recipe import load_recipe
from embeddings_cache.images import decode_rle, generate_scene
from students import InputError

JSON = {"Content-Type": "application/json"}
SIDES = (480, 640, 1024)
"""Longest sides of the pictures, in turn."""

CLICKS = 5
"""Prompts of a picture: four clicks, and a box."""

RIGHT = 0.99
"""IoU with `SamPredictor`'s mask; of a mask below it some pixels more than those at its edge differ."""

START_SECONDS = 600
"""For making the files, too."""


@dataclass
class ServeBenchmark:
    run_dir: str | None = None  # whose student is served
    checkpoint: str | None = None  # or a checkpoint
    options: str = ""  # of stage=serve, after spaces: serve.decoders=1 serve.backend=torch
    clients: int = 16  # that ask at the same time, each as soon as it has its answer
    seconds: int = 300  # of load
    pictures: int = 50  # that they click on
    overload: int = 160  # clients that then ask for new pictures for ten seconds
    out: str = "benchmark.json"  # where the numbers go


@dataclass(frozen=True)
class Task:
    """A picture's file with prompts, and the mask that `SamPredictor` makes of each, boolean (H, W)."""

    file: bytes
    prompts: list[dict[str, Any]]
    expected: list[np.ndarray]


@dataclass
class Load:
    """What clients came to.

    Attributes:
        took: seconds of each click, by client in the order of its requests.
        answers: how often each was given, by picture, prompt and the mask's size and runs.
        statuses: how often each status was answered; 0: none at all.
        memory: resident bytes of the server, every second.
    """

    took: list[float] = field(default_factory=list)
    answers: Counter[tuple[int, int, tuple[int, int], str]] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)


class Client:
    """A connection that is kept.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self._connection = HTTPConnection(urlsplit(url).netloc, timeout=120)

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an answer; status 0 where there was none."""
        try:
            self._connection.request("POST", path, body, headers)
            answer = self._connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, HTTPException, ValueError):
            self._connection.close()
            return 0, {}

    def embed(self, file: bytes) -> tuple[int, str]:
        """Status, and a picture's id."""
        status, answer = self.post("/v1/embed", file, {"Content-Type": "image/jpeg"})
        return status, answer.get("id", "")

    def click(self, id: str, prompt: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status, and the answer to one prompt."""
        return self.post("/v1/masks", json.dumps({"id": id, "prompts": [prompt]}).encode(), JSON)


def benchmark_serve(settings: ServeBenchmark) -> dict[str, Any]:
    """Measure, and return what goes to `benchmark.json`.

    Raises:
        InputError: no student, or the server does not start.
    """
    words = [f"{key}={value}" for key in ("run_dir", "checkpoint") if (value := getattr(settings, key))]
    if not words:
        raise InputError("serve needs run_dir=RUN or checkpoint=FILE")
    words = ["stage=serve", *words, *settings.options.split()]
    subject = load_subject(load_recipe(words))
    if subject.sam is None:
        raise InputError(f"{subject.name}: {subject.note}")
    tasks = make_tasks(subject.sam, settings.pictures)
    with started([*words, "port=0"]) as (process, url):
        rows = [*first_requests(url, tasks), *loaded(url, process.pid, settings, tasks)]
        rows += overloaded(url, settings)
        process.terminate()
        if (code := process.wait(30)) != 0:
            raise InputError(f"the server ended with exit code {code}")
    named = {"name": subject.name, "image_size": subject.image_size}
    rows = [{**named, **row} for row in rows]
    return {"settings": vars(settings), "machine": machine(torch.device("cpu")), "rows": rows}


def make_tasks(sam: Sam, count: int) -> list[Task]:
    """Generated scenes, and what the student in PyTorch makes of their prompts."""
    predictor, tasks = SamPredictor(sam), []
    for seed in range(count):
        random_numbers = np.random.default_rng([1, seed])
        file = scene_file(seed)
        image = np.asarray(Image.open(io.BytesIO(file)))
        predictor.set_image(image)
        height, width = image.shape[:2]
        points = (random_numbers.uniform(0.05, 0.95, (CLICKS - 1, 2)) * (width, height)).round(1)
        box = [0.2 * width, 0.25 * height, 0.7 * width, 0.8 * height]
        prompts: list[dict[str, Any]] = [{"points": [point.tolist()]} for point in points]
        expected = []
        for point in points:
            masks, ious, _ = predictor.predict(point[None], np.ones(1), multimask_output=True)
            expected.append(masks[ious.argmax()])
        masks, _, _ = predictor.predict(box=np.array(box), multimask_output=False)
        tasks.append(Task(file, [*prompts, {"box": box}], [*expected, masks[0]]))
    return tasks


def scene_file(seed: int) -> bytes:
    """A scene as JPEG."""
    scene, _ = generate_scene(np.random.default_rng([2, seed]), SIDES[seed % len(SIDES)])
    file = io.BytesIO()
    Image.fromarray(scene).save(file, "JPEG", quality=90)
    return file.getvalue()


@contextmanager
def started(words: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and where it is.

    Raises:
        InputError: it ends before its port is open.
    """
    command = [sys.executable, "-c", "import sys; from distill.main import main; sys.exit(main(sys.argv[1:]))", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch = threading.Timer(START_SECONDS, process.kill)
    watch.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=sys.stderr)
            if line.startswith("serve: http"):
                watch.cancel()
                yield process, line.split()[1]
                return
        raise InputError("the server did not start")
    finally:
        watch.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()


def first_requests(url: str, tasks: list[Task]) -> list[dict[str, Any]]:
    """The first request of a fresh server beside the median of its 91st to 110th, one after the other: clicks on one
    picture, and the same picture as a new file each time."""
    Client(url).post("/health", b"", {})  # the first time of this process's own code, which answers 405, counts nowhere
    client, task = Client(url), tasks[0]
    embeds = [_timed(lambda number=number: client.embed(task.file + b"%d" % number)) for number in range(110)]
    _, id = client.embed(task.file)
    clicks = [_timed(lambda: client.click(id, task.prompts[0])) for _ in range(110)]
    return [
        {
            "backend": f"first {what}",
            "median_ms": 1e3 * float(np.median(took[90:])),
            "first_ms": 1e3 * took[0],
            "p10_ms": 1e3 * float(np.quantile(took[90:], 0.1)),
            "p90_ms": 1e3 * float(np.quantile(took[90:], 0.9)),
        }
        for what, took in (("picture", embeds), ("click", clicks))
    ]


def loaded(url: str, pid: int, settings: ServeBenchmark, tasks: list[Task]) -> list[dict[str, Any]]:
    """Clicks of all clients on all pictures."""
    load, lock = Load(), threading.Lock()
    end = time.monotonic() + settings.seconds

    def work(number: int) -> None:
        client, choice, ids = Client(url), random.Random(number), {}
        while time.monotonic() < end:
            place, prompt = choice.randrange(len(tasks)), choice.randrange(CLICKS)
            if place not in ids:
                status, ids[place] = client.embed(tasks[place].file)
                with lock:
                    load.statuses[status] += 1
            began = time.perf_counter()
            status, answer = client.click(ids[place], tasks[place].prompts[prompt])
            took = time.perf_counter() - began
            with lock:
                load.statuses[status] += 1
                load.took.append(took)
                if status == 200:
                    rle = answer["masks"][0][0]["rle"]
                    load.answers[place, prompt, tuple(rle["size"]), rle["counts"]] += 1
            if status == 404:
                del ids[place]

    with ThreadPoolExecutor(settings.clients) as threads:
        running = [threads.submit(work, number) for number in range(settings.clients)]
        while time.monotonic() < end:
            load.memory.append(resident_bytes(pid))
            time.sleep(1)
        for each in running:
            each.result()
    return [described(load, settings, tasks)]


def described(load: Load, settings: ServeBenchmark, tasks: list[Task]) -> dict[str, Any]:
    """A row of the table. Memory is that of the last tenth of the time over that of the second: what embeddings take is
    there by then."""
    fits = {key: mask_iou(_mask(key), tasks[key[0]].expected[key[1]]) for key in load.answers}
    tenth = max(1, len(load.memory) // 10)
    early, late = np.median(load.memory[tenth : 2 * tenth]), np.median(load.memory[-tenth:])
    return {
        "backend": f"{settings.clients} clients",
        "clicks": sum(load.answers.values()),
        "clicks_per_s": sum(load.answers.values()) / settings.seconds,
        "errors": sum(count for status, count in load.statuses.items() if status != 200),
        "wrong_masks": sum(count for key, count in load.answers.items() if fits[key] < RIGHT),
        "least_iou": min(fits.values()),
        "median_ms": 1e3 * float(np.median(load.took)),
        "p99_ms": 1e3 * float(np.quantile(load.took, 0.99)),
        "p10_ms": 1e3 * float(np.quantile(load.took, 0.1)),
        "p90_ms": 1e3 * float(np.quantile(load.took, 0.9)),
        "memory_mb": float(late) / 2**20,
        "memory_growth": float(late / early),
        "memory_samples_mb": [round(each / 2**20) for each in load.memory],
    }


def overloaded(url: str, settings: ServeBenchmark) -> list[dict[str, Any]]:
    """Far more clients, each with pictures that nobody has sent before; and a single one afterwards."""
    statuses: Counter[int] = Counter()
    refused: list[float] = []
    lock = threading.Lock()
    file, end = scene_file(0), time.monotonic() + 10

    def work(number: int) -> None:
        client, sent = Client(url), 0
        while time.monotonic() < end:
            sent += 1
            began = time.perf_counter()
            status, _ = client.embed(file + b"%d %d" % (number, sent))
            took = time.perf_counter() - began
            with lock:
                statuses[status] += 1
                if status == 503:
                    refused.append(took)
            if status == 503:
                time.sleep(0.2)

    with ThreadPoolExecutor(settings.overload) as threads:
        for each in [threads.submit(work, number) for number in range(settings.overload)]:
            each.result()
    client = Client(url)
    after = [_timed(lambda number=number: client.embed(file + b"after %d" % number)) for number in range(10)]
    return [
        {
            "backend": f"overload, {settings.overload} clients",
            "answered": statuses[200],
            "refused": statuses[503],
            "errors": sum(count for status, count in statuses.items() if status not in (200, 503)),
            "refused_median_ms": 1e3 * float(np.median(refused)) if refused else None,
            "refused_p99_ms": 1e3 * float(np.quantile(refused, 0.99)) if refused else None,
            "median_ms": 1e3 * float(np.median(after)),
        }
    ]


def resident_bytes(pid: int) -> int:
    """What a process has in memory.

    Raises:
        InputError: it has ended.
    """
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    line = next((line for line in status.splitlines() if line.startswith("VmRSS")), None)
    if line is None:
        raise InputError("the server has ended")
    return int(line.split()[1]) * 1024


def _timed(ask: Any) -> float:
    began = time.perf_counter()
    status, _ = ask()
    if status != 200:
        raise InputError(f"the server answered {status}")
    return time.perf_counter() - began


def _mask(key: tuple[int, int, tuple[int, int], str]) -> np.ndarray:
    return decode_rle({"size": list(key[2]), "counts": key[3]})
