"""A server of a small student on a port, and what a client says to it."""

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnx
from PIL import Image
from segment_anything import SamPredictor

from distill.export.encoder import RgbEncoder
from distill.export.onnx import batch_decoder_model, encoder_model
from distill.schema import PredictRecipe, ServeRecipe
from distill.serve.app import ROUTES
from distill.serve.engines import Engine, OnnxEngine
from distill.serve.messages import Health
from distill.serve.metrics import Metrics
from distill.serve.server import Server, bind
from distill.serve.service import Service
from distill.serve.start import LOOPBACK_NAMES, application
from embeddings_cache.images import Reading
from embeddings_cache.images.scenes import generate_scene
from exports import SIZE, small_student, toy
from students import build_student_sam

JSON = {"Content-Type": "application/json"}


@cache
def served_files() -> Path:
    """A folder with what is served of a small student."""
    folder = Path(mkdtemp(prefix="served-"))
    sam = build_student_sam(small_student(), toy())
    onnx.save(encoder_model(RgbEncoder(small_student()).eval(), dynamic_batch=True), folder / "encoder.onnx")
    onnx.save(batch_decoder_model(sam), folder / "decoder_batch.onnx")
    return folder


@cache
def engine(batch_size: int = 4) -> OnnxEngine:
    return OnnxEngine(served_files(), threads=1, batch_size=batch_size)


@cache
def predictor_sam() -> Any:
    return build_student_sam(small_student(), toy())


def predictor_of(file: bytes) -> SamPredictor:
    """segment-anything's own, with the student in PyTorch, which has looked at a picture."""
    predictor = SamPredictor(predictor_sam())
    predictor.set_image(np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))
    return predictor


def scene(seed: int = 0, size: tuple[int, int] = (150, 190), kind: str = "PNG") -> bytes:
    """A picture's file; `size` is height and width."""
    made, _ = generate_scene(np.random.default_rng(seed), SIZE)
    picture = Image.fromarray(made).resize(size[::-1], Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


class Client:
    """Asks a server; a connection for each request."""

    def __init__(self, port: int, service: Service | None = None) -> None:
        self.port = port
        self.service = service

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (small letters) and body of an answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, path: str, what: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON of the answer to JSON."""
        status, _, body = self.ask("POST", path, json.dumps(what).encode(), {**JSON, **headers})
        return status, json.loads(body)

    def embed(self, file: bytes) -> str:
        """The id of a picture that was taken."""
        status, _, body = self.ask("POST", "/v1/embed", file, {"Content-Type": "image/png"})
        assert status == 200, body
        return str(json.loads(body)["id"])

    def masks(self, **request: Any) -> list[list[dict[str, Any]]]:
        """The masks of each prompt."""
        status, answer = self.post("/v1/masks", request)
        assert status == 200, answer
        return answer["masks"]  # type: ignore[no-any-return]

    def metric(self, name: str) -> float:
        """A number of `/metrics`."""
        _, _, page = self.ask("GET", "/metrics")
        line = next(line for line in page.decode().splitlines() if line.startswith(f"{name} "))
        return float(line.split()[1])

    def connect(self) -> socket.socket:
        """A connection as such."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)


@contextmanager
def running(
    settings: ServeRecipe | None = None,
    engine_at_work: Engine | None = None,
    page: Path | None = None,
    token: str | None = None,
    decoders: int = 2,
    batch_size: int = 4,
) -> Iterator[Client]:
    """A server in a thread of this process, on a port of its own."""
    settings = settings or ServeRecipe()
    work = engine_at_work or engine(batch_size)
    predict = PredictRecipe(points_per_side=6, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    reading = Reading(settings.max_pixels)
    service = Service(work, settings, reading, predict, decoders, batch_size, Metrics(ROUTES))
    health = Health("ok", "small", work.image_size, work.about)
    app = application(service, health, page, token, None if token else list(LOOPBACK_NAMES))
    opened = threading.Event()
    with bind("127.0.0.1", 0) as listener:
        server = Server(app, settings.stop_seconds, opened.set)
        thread = threading.Thread(target=server.serve_on, args=(listener,))
        port = listener.getsockname()[1]
        thread.start()
        try:
            assert opened.wait(60)
            yield Client(port, service)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server does not end"


def in_base64(file: bytes) -> str:
    return base64.b64encode(file).decode()
