"""The backend for Label Studio, as a process of its own on a port: what it answers is what `SamPredictor` makes of the
same clicks, and nothing that it is sent ends it."""

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import onnx
import pytest
from PIL import Image, ImageOps
from segment_anything import SamPredictor

from distill.clients import write_client
from distill.evaluate.ious import mask_iou
from distill.export.onnx import decoder_model, low_res_model
from embeddings_cache.images.scenes import generate_scene
from exports import onnx_of, small_student, toy
from students import build_student_sam

FINGERPRINT = "0123456789abcdef"
KEY = "legacy-token"
LABELS = '<Label value="Cat"/><Label value="Dog" alias="dog"/>'
CONFIG = f"""
<View>
  <Image name="image" value="$picture"/>
  <BrushLabels name="brush" toName="image">{LABELS}</BrushLabels>
  <KeypointLabels name="point" toName="image" smart="true">{LABELS}</KeypointLabels>
  <RectangleLabels name="box" toName="image" smart="true">{LABELS}</RectangleLabels>
</View>
"""

SIZES = {"landscape": (150, 209), "portrait": (190, 130), "square": (128, 128), "large": (900, 1300)}
"""Height and width of pictures."""

VERSION = "1.23.2"
"""Of Label Studio; what the README says was tried."""


def scene(height: int, width: int) -> Image.Image:
    made, _ = generate_scene(np.random.default_rng(2), 128)
    return Image.fromarray(made).resize((width, height), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str = "PNG", orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


def inline(file: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def upright(file: bytes) -> np.ndarray:
    """As a browser shows it: uint8 (H, W, 3)."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB"))


@dataclass
class Clicks:
    """A prompt in percent of the picture; `box` is x, y, width, height."""

    points: list[tuple[float, float]] = field(default_factory=list)
    positive: list[bool] = field(default_factory=list)
    box: tuple[float, float, float, float] | None = None

    def regions(self, size: tuple[int, int], label: str = "Cat", image: str = "image") -> list[dict[str, Any]]:
        """As Label Studio's editor sends it; `size` is height and width."""
        common = {"to_name": image, "original_height": size[0], "original_width": size[1], "image_rotation": 0}
        made = []
        for (x, y), positive in zip(self.points, self.positive, strict=True):
            value = {"x": x, "y": y, "width": 0.4, "keypointlabels": [label], "labels": [label]}
            made.append({**common, "type": "keypointlabels", "from_name": "point", "value": value})
            made[-1]["is_positive"] = positive
        if self.box is not None:
            value = dict(zip(("x", "y", "width", "height"), self.box, strict=True))
            value |= {"rotation": 0, "rectanglelabels": [label]}
            made.append({**common, "type": "rectanglelabels", "from_name": "box", "value": value})
        return [{**region, "id": f"r{number}", "origin": "manual"} for number, region in enumerate(made)]

    def expected(self, predictor: SamPredictor) -> np.ndarray:
        """`SamPredictor`'s mask: of three after one click, else the one for clear prompts."""
        height, width = predictor.original_size
        scale = np.array([width, height]) / 100
        given: dict[str, Any] = {}
        if self.points:
            given["point_coords"] = np.array(self.points) * scale
            given["point_labels"] = np.array(self.positive, int)
        if self.box is not None:
            x, y, wide, high = self.box
            given["box"] = np.array([x, y, x + wide, y + high]) * np.tile(scale, 2)
        masks, ious, _ = predictor.predict(**given, multimask_output=self.box is None and len(self.points) == 1)
        return masks[int(ious.argmax())]


PROMPTS = {
    "a click": Clicks([(42, 55)], [True]),
    "a click beside": Clicks([(42, 55), (80, 20)], [True, False]),
    "four clicks": Clicks([(30, 30), (70, 70), (10, 90), (50, 45)], [True, True, False, True]),
    "a rectangle": Clicks(box=(20, 15, 45, 60)),
    "a rectangle and clicks": Clicks([(40, 40), (25, 70)], [True, False], (15, 20, 60, 60)),
}


def decoded(rle: list[int], height: int, width: int) -> np.ndarray:
    """A brush region's values, uint8 (H, W, 4), read bit by bit as rle-pack describes them."""
    bits, at = "".join(f"{byte:08b}" for byte in rle), 0

    def read(count: int) -> int:
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    total, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < total:
        run = read(1)
        length = read(sizes[read(2)]) + 1
        values += [read(word)] * length if run else [read(word) for _ in range(length)]
    assert len(bits) - at < 8
    return np.array(values, np.uint8).reshape(height, width, 4)


def mask_of(region: dict[str, Any]) -> np.ndarray:
    assert region["value"]["format"] == "rle"
    values = decoded(region["value"]["rle"], region["original_height"], region["original_width"])
    assert set(np.unique(values)) <= {0, 255}
    assert (values == values[..., :1]).all()
    return values[..., 3] > 0


@dataclass
class Process:
    """A running backend."""

    url: str
    process: subprocess.Popen[str]

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any], str]:
        """Status, answer and the reason in the status line."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json", **(headers or {})})
        try:
            with urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read() or b"null"), answer.reason
        except HTTPError as error:
            return error.code, json.loads(error.read()), error.reason

    def predict(self, data: dict[str, Any], regions: Any, config: str = CONFIG) -> tuple[int, dict[str, Any], str]:
        task = {"id": 7, "data": data, "annotations": [], "predictions": [], "drafts": []}
        params = {"login": None, "password": None, "context": {"result": regions}}
        return self.ask("/predict", {"tasks": [task], "project": "1.1", "label_config": config, "params": params})

    def region(self, data: dict[str, Any], regions: Any, config: str = CONFIG) -> dict[str, Any]:
        """The one region of a prediction."""
        status, answer, reason = self.predict(data, regions, config)
        assert status == 200, reason
        (prediction,) = answer["results"]
        assert prediction["model_version"] == FINGERPRINT
        (found,) = prediction["result"]
        assert 0 <= found["score"] == prediction["score"] <= 1.1
        return found

    def refused(self, status: int, said: str, data: dict[str, Any], regions: Any, config: str = CONFIG) -> None:
        """That this is answered with a reason and an empty prediction."""
        found, answer, reason = self.predict(data, regions, config)
        assert (found, answer["results"][0]["result"]) == (status, []), answer
        assert said in answer["error"]
        assert reason.isascii()


@contextmanager
def backend(folder: Path, *options: str, **environment: str) -> Iterator[Process]:
    """`server.py` as a process, from when its port is open."""
    command = [sys.executable, "server.py", "--port", "0", "--threads", "1", *options]
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if FINGERPRINT in line:
                break
        else:
            pytest.fail("".join(lines))
        address = line.split(f"{FINGERPRINT} at ")[1].split(",")[0]
        drain = threading.Thread(target=process.stderr.read, daemon=True)  # or the pipe would fill up
        drain.start()
        yield Process(address, process)
    finally:
        process.kill()
        process.wait()


class Host(BaseHTTPRequestHandler):
    """A stand-in for the host of Label Studio, and for others; what it was asked for, and with which key, is kept."""

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        if self.path.startswith("/slow"):
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b".")
                    self.wfile.flush()
                    time.sleep(0.1)
            return
        if self.path in self.server.moved:
            self.send_response(302)
            self.send_header("Location", self.server.moved[self.path])
            self.end_headers()
            return
        needs = self.server.needs
        status = 200 if self.path in self.server.files else 404
        if needs and self.headers.get("Authorization") != needs:
            status = 401
        self.send_response(status)
        self.end_headers()
        if status == 200:
            self.wfile.write(self.server.files[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body))
        self.send_response(302 if self.path in self.server.moved else 200)
        if self.path in self.server.moved:
            self.send_header("Location", self.server.moved[self.path])
        self.end_headers()
        self.wfile.write(b'{"access": "fresh"}')

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def host(files: dict[str, bytes], needs: str | None = None, moved: dict[str, str] | None = None) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.files, server.needs, server.moved, server.seen = files, needs, moved or {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an export hands out."""
    directory = tmp_path_factory.mktemp("label_studio")
    models = {"encoder": onnx.ModelProto(), "decoder": decoder_model(low_res_model(toy(), single=True))}
    models["encoder"].CopyFrom(onnx_of())
    for name, model in models.items():
        onnx.helper.set_model_props(model, {"fingerprint": FINGERPRINT})
        onnx.save(model, directory / f"{name}.onnx")
    write_client("label_studio", directory, {"name": "tiny", "title": "Tiny", "fingerprint": FINGERPRINT, "size": 128})
    return directory


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Of Label Studio's host, by path."""
    found = {f"/data/upload/1/{name}.png": encoded(scene(*size)) for name, size in SIZES.items()}
    found["/data/local-files/?d=photos/a%20cat.png"] = found["/data/upload/1/square.png"]
    found["/data/upload/1/whole%20%C3%BCrl.png"] = found["/data/upload/1/square.png"]
    found["/data/upload/1/huge.png"] = b"\0" * 3_000_000
    found["/data/upload/1/text.png"] = b"no picture"
    return found


@pytest.fixture(scope="module")
def studio(files: dict[str, bytes]) -> Iterator[Any]:
    with host(files, f"Token {KEY}") as server:
        yield server


@pytest.fixture(scope="module")
def running(folder: Path, studio: Any) -> Iterator[Process]:
    environment = {"LABEL_STUDIO_URL": studio.url, "LABEL_STUDIO_API_KEY": KEY}
    with backend(folder, "--max-mb", "2", "--timeout", "1", **environment) as process:
        yield process


@pytest.fixture(scope="module")
def predictor() -> SamPredictor:
    return SamPredictor(build_student_sam(small_student(), toy()))


def awkward_masks() -> list[np.ndarray]:
    """Empty, full, noisy, of one pixel, and with runs that end where a kind of run length does."""
    rng = np.random.default_rng(0)
    made = [rng.random((13, 29)) < share for share in (0, 0.02, 0.5, 0.98, 1)]
    made += [np.ones((1, 1), bool), rng.random((40, 1)) < 0.5, np.zeros((1, 7), bool)]
    lengths = [1, 2, 3, 4, 5, 63, 64, 65, 16383, 16384, 16385, 32768, 40000, 2]
    made.append(np.repeat(np.arange(len(lengths)) % 2 > 0, lengths)[None])
    return made


def encoded_by(folder: Path, masks: list[np.ndarray]) -> list[list[int]]:
    """Masks as `brush.py` of a folder encodes them."""
    spec = importlib.util.spec_from_file_location("handed_out_brush", folder / "brush.py")
    assert spec is not None
    assert spec.loader is not None
    brush = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(brush)
    return [brush.encode_mask(mask) for mask in masks]


def test_run_lengths_are_read_back_bit_by_bit(folder: Path) -> None:
    masks = awkward_masks()
    for mask, rle in zip(masks, encoded_by(folder, masks), strict=True):
        np.testing.assert_array_equal(decoded(rle, *mask.shape), np.repeat(mask[..., None] * np.uint8(255), 4, axis=2))


@pytest.mark.parametrize("name", SIZES)
def test_clicks_and_rectangles_become_the_predictors_masks(
    name: str, running: Process, predictor: SamPredictor, files: dict[str, bytes]
) -> None:
    path = f"/data/upload/1/{name}.png"
    predictor.set_image(upright(files[path]))
    shares = []
    for clicks in PROMPTS.values():
        region = running.region({"picture": path}, clicks.regions(SIZES[name]))
        assert (region["original_height"], region["original_width"]) == SIZES[name]
        expected = clicks.expected(predictor)
        assert mask_iou(mask_of(region), expected) >= 0.99
        shares.append(expected.mean())
        assert (region["from_name"], region["to_name"], region["type"]) == ("brush", "image", "brushlabels")
        assert region["value"]["brushlabels"] == ["Cat"]
    assert 0.01 < np.median(shares) < 0.9  # or there would be nothing to compare


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_percents_are_of_the_picture_as_a_browser_shows_it(
    orientation: int, running: Process, predictor: SamPredictor
) -> None:
    file = encoded(scene(120, 200), "JPEG", orientation)
    picture = upright(file)
    assert picture.shape[:2] == ((120, 200) if orientation == 3 else (200, 120))
    predictor.set_image(picture)
    for clicks in PROMPTS.values():
        region = running.region({"picture": inline(file)}, clicks.regions(picture.shape[:2]))
        assert mask_iou(mask_of(region), clicks.expected(predictor)) >= 0.99
    running.refused(422, "and Label Studio says", {"picture": inline(file)}, PROMPTS["a click"].regions((1, 1)))


def test_a_turned_rectangle_is_the_upright_one_around_it(running: Process, files: dict[str, bytes]) -> None:
    path, size = "/data/upload/1/landscape.png", SIZES["landscape"]
    (turned,) = Clicks(box=(60, 20, 40, 25)).regions(size)
    turned["value"]["rotation"] = 90  # about its first corner, clockwise: it lies to the left of it
    height, width = size
    around = Clicks(box=(60 - 25 * height / width, 20, 25 * height / width, 40 * width / height))
    found = mask_of(running.region({"picture": path}, [turned]))
    np.testing.assert_array_equal(found, mask_of(running.region({"picture": path}, around.regions(size))))


def test_the_answer_is_for_the_brush_of_the_image_that_was_clicked(running: Process, predictor: SamPredictor) -> None:
    config = f"""
    <View>
      <View><Image name="before" value="$a"/><Image name="after" valueList="$more.shots"/></View>
      <BrushLabels name="damage" toName="after"><Label value="Dent"/><Label value="Scratch"/></BrushLabels>
      <BrushLabels name="animals" toName="before,after">{LABELS}</BrushLabels>
      <BrushLabels name="free" toName="after" value="$labels"/>
      <Brush name="plain" toName="before"/><Choices name="c" toName="before"><Choice value="x"/></Choices>
    </View>"""
    first, second, third = (encoded(scene(*SIZES[name])) for name in ("landscape", "portrait", "square"))
    data = {"a": inline(first), "more": {"shots": [inline(second), inline(third)]}}
    clicks = PROMPTS["a rectangle"]
    for image, label, brush, called, index, file in [
        ("before", "Cat", "animals", "Cat", None, first),
        ("before", "Dog", "animals", "dog", None, first),
        ("after", "dog", "animals", "dog", 0, second),
        ("after", "Dent", "damage", "Dent", 1, third),
        ("after", "Unheard-of", "free", "Unheard-of", 1, third),
    ]:
        picture = upright(file)
        regions = clicks.regions(picture.shape[:2], label, image)
        if index is not None:
            regions[0]["item_index"] = index
        region = running.region(data, regions, config)
        assert (region["to_name"], region["from_name"]) == (image, brush)
        assert region["value"]["brushlabels"] == [called]
        assert region.get("item_index") == index
        predictor.set_image(picture)
        assert mask_iou(mask_of(region), clicks.expected(predictor)) >= 0.99

    # Clicks on one image do not count on the other.
    elsewhere = PROMPTS["a click"].regions(SIZES["portrait"], "Cat", "after")
    here = clicks.regions(SIZES["landscape"], "Cat", "before")
    both = running.region(data, [*elsewhere, *here], config)
    assert both["value"] == running.region(data, here, config)["value"]

    running.refused(
        400, "no BrushLabels for 'before' has the label 'Dent'", data, clicks.regions((1, 1), "Dent", "before"), config
    )
    running.refused(400, "no Image named 'x'", data, clicks.regions((1, 1), "Cat", "x"), config)


def test_where_one_label_is_all_that_there_is_a_click_needs_none(running: Process) -> None:
    brush = '<BrushLabels name="b" toName="image"><Label value="Cat"/></BrushLabels>'
    config = f'<View><Image name="image" value="$a"/>{brush}</View>'
    (region,) = PROMPTS["a rectangle"].regions((128, 128))
    region["type"] = "rectangle"
    del region["value"]["rectanglelabels"], region["original_width"], region["original_height"]
    data = {"a": inline(encoded(scene(128, 128)))}
    assert running.region(data, [region], config)["value"]["brushlabels"] == ["Cat"]
    running.refused(400, "has a region without a label", {"picture": data["a"]}, [region])


def test_tasks_that_nobody_clicked_in_get_no_prediction(running: Process) -> None:
    tasks = [{"id": number, "data": {"picture": "/data/upload/1/none.png"}} for number in range(3)]
    for params in ({}, {"context": None}, {"context": {"result": []}}, None):
        status, answer, _ = running.ask("/predict", {"tasks": tasks, "label_config": CONFIG, "params": params})
        assert status == 200
        assert answer["results"] == [[], [], []]


def test_what_else_label_studio_asks(running: Process) -> None:
    for path in ("/", "/health"):
        status, answer, _ = running.ask(path)
        assert (status, answer["status"]) == (200, "UP")
    setup = {
        "project": "1.2",
        "schema": CONFIG,
        "hostname": "http://evil.example",
        "access_token": "x",
        "extra_params": None,
    }
    assert running.ask("/setup", setup)[:2] == (200, {"model_version": FINGERPRINT})
    assert running.ask("/versions")[1] == {"versions": [FINGERPRINT]}
    for path in ("/webhook", "/train"):
        assert running.ask(path, {"action": "START_TRAINING", "project": {"id": 1}})[0] == 200


def test_pictures_are_fetched_from_label_studio_with_its_key(running: Process, studio: Any) -> None:
    clicks = PROMPTS["a click"].regions(SIZES["square"])
    studio.seen.clear()
    for where in ("/data/local-files/?d=photos/a cat.png", f"{studio.url}/data/upload/1/whole ürl.png"):
        for _ in range(2):
            running.region({"picture": where}, clicks)
    seen = [path for path, key in studio.seen if key == f"Token {KEY}"]
    assert seen == ["/data/local-files/?d=photos/a%20cat.png", "/data/upload/1/whole%20%C3%BCrl.png"]  # once each


def test_a_personal_access_token_is_exchanged_and_goes_to_label_studio_alone(folder: Path) -> None:
    picture = encoded(scene(128, 128))
    clicks = PROMPTS["a click"].regions((128, 128))
    with host({"/signed.png": picture}) as bucket:
        coded = base64.urlsafe_b64encode(b"s3://bucket/cat.png").decode()
        moved = {
            f"/tasks/7/presign/?fileuri={coded}": f"{bucket.url}/signed.png",
            "/away.png": "http://127.0.0.1:1/",
            "/nearer.png": "/cat.png",
            "/login/api/token/refresh/": "/cat.png",
        }
        with host({"/cat.png": picture}, "Bearer fresh", moved) as studio:
            environment = {"LABEL_STUDIO_URL": f"{studio.url}/", "LABEL_STUDIO_API_KEY": "head.body.sign"}
            allowed = bucket.url.removeprefix("http://")
            with backend(folder, "--allow-host", allowed, **environment) as running:
                running.region({"picture": "/cat.png"}, clicks)
                assert studio.seen == [
                    ("/api/token/refresh/", {"refresh": "head.body.sign"}),
                    ("/cat.png", "Bearer fresh"),
                ]
                running.region({"picture": "s3://bucket/cat.png"}, clicks)
                assert bucket.seen == [("/signed.png", None)]
                running.refused(403, "pictures are not fetched from 127.0.0.1:1", {"picture": "/away.png"}, clicks)
                running.region({"picture": "/nearer.png"}, clicks)
                assert studio.seen[-1] == ("/cat.png", "Bearer fresh")
            environment["LABEL_STUDIO_URL"] = f"{studio.url}/login"
            with backend(folder, **environment) as running:
                running.refused(424, "is LABEL_STUDIO_API_KEY right?", {"picture": "/cat.png"}, clicks)
                assert studio.seen[-1] == ("/cat.png", None)


def test_nothing_is_fetched_from_where_it_was_not_allowed(running: Process, studio: Any) -> None:
    clicks = PROMPTS["a click"].regions((128, 128))
    with host({"/": encoded(scene(128, 128))}) as internal:
        port = internal.server_port
        for where in (
            f"http://127.0.0.1:{port}/",
            f"http://localhost:{studio.server_port}/data/upload/1/square.png",
            f"{studio.url}@127.0.0.1:{port}/",
            f"http://127.0.0.1:{port}\\@127.0.0.1:{studio.server_port}/",
            f"HTTP://127.0.0.1:{port}/",
            f"//127.0.0.1:{port}/",
            "file:///etc/passwd",
            "ftp://127.0.0.1/x",
            f"ftp://127.0.0.1:{studio.server_port}/x",
            "gopher://127.0.0.1/",
            "http://169.254.169.254/latest/meta-data/",
            "http://[::1]/",
            "http://127.0.0.1:99999/",
            "s3://bucket",  # Label Studio has no such file
            "etc/passwd",
            f"{studio.url}\r\nHost: x/",
        ):
            found, answer, reason = running.predict({"picture": where}, clicks)
            assert found in (403, 424), where
            assert answer["results"][0]["result"] == []
            assert answer["error"]
            assert "\n" not in reason
        assert internal.seen == []


def test_pictures_that_do_not_come_or_are_none_are_answered_with_the_reason(running: Process) -> None:
    clicks = PROMPTS["a click"].regions((128, 128))
    running.refused(424, "missing.png': 404", {"picture": "/data/upload/1/missing.png"}, clicks)
    running.refused(413, "has more than 2,097,152 bytes", {"picture": "/data/upload/1/huge.png"}, clicks)
    running.refused(424, "took longer than 1 s", {"picture": "/slow"}, clicks)
    running.refused(422, "not a picture", {"picture": "/data/upload/1/text.png"}, clicks)
    running.refused(422, "not a picture", {"picture": inline(encoded(scene(64, 64))[:200])}, clicks)
    running.refused(413, "has more than", {"picture": inline(b"\0" * 3_000_000)}, clicks)
    running.refused(400, "malformed", {"picture": "data:image/png;base64,!!!"}, clicks)
    running.refused(400, "malformed", {"picture": "data:image/png;base64"}, clicks)
    for data in ({}, {"picture": None}, {"picture": 3}, {"picture": {"a": 1}}, {"picture": []}, {"picture": ""}):
        running.refused(400, "no picture for '$picture'", data, clicks)


def test_requests_that_make_no_sense_are_answered_with_the_reason(running: Process, folder: Path) -> None:
    data = {"picture": inline(encoded(scene(128, 128)))}

    def one(**changes: Any) -> list[dict[str, Any]]:
        (region,) = PROMPTS["a rectangle"].regions((128, 128))
        region["value"] |= changes
        return [region]

    for value in (None, "50", True, 1e300, [], {}):
        running.refused(400, "is no number that makes sense", data, one(x=value))
    body = json.dumps(
        {"tasks": [{"id": 1, "data": data}], "label_config": CONFIG, "params": {"context": {"result": one()}}}
    )
    assert running.ask("/predict", body.replace('"x": 20', '"x": NaN').encode())[0] == 400
    running.refused(400, "no list of regions", data, "regions")
    running.refused(400, "no list of regions", data, ["region"])
    running.refused(400, "more than 1000", data, one() * 1001)
    running.refused(400, "a region has no value", data, [{"type": "keypointlabels"}])
    running.refused(400, "only keypoints and rectangles", data, [{"type": "brushlabels", "value": {}}])
    running.refused(400, "shown turned", data, [{**one()[0], "image_rotation": 90}])
    bomb = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]><View>&c;</View>'
    running.refused(400, "no labelling configuration", data, one(), bomb)
    running.refused(400, "is no XML", data, one(), "<View>")
    running.refused(400, "no Image named 'image'", data, one(), "<View/>")
    running.refused(
        400, "no BrushLabels with toName", data, one(), '<View><Image name="image" value="$picture"/></View>'
    )
    for body in (b"{", b"[]", b"\xff", b"[" * 100_000, b'{"tasks": 3}', b'{"tasks": ["x"]}'):
        assert running.ask("/predict", body)[0] == 400
    assert running.ask("/predict", {}, {"Content-Type": "text/plain"})[0] == 415
    assert running.ask("/predict", {}, {"Content-Length": "999999999999"})[0] == 413
    assert running.ask("/etc/passwd")[0] == 404
    assert running.ask("/predict")[0] == 404
    port = int(running.url.rpartition(":")[2])
    for raw in (
        b"",
        b"GET",
        b"\0" * 5000,
        b"POST /predict HTTP/1.1\r\nContent-Length: 90\r\n\r\n{",
        b"BREW / HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(raw)
    off_the_picture = Clicks([(-5, 130)], [True]).regions((128, 128))
    assert running.predict(data, off_the_picture)[0] == 200
    assert running.region(data, PROMPTS["a rectangle"].regions((128, 128)))
    assert running.process.poll() is None


def test_several_annotators_at_once_get_their_own_answers(running: Process) -> None:
    alone = {
        name: running.region({"picture": f"/data/upload/1/{name}.png"}, PROMPTS["a rectangle"].regions(SIZES[name]))
        for name in SIZES
    }
    found: dict[int, Any] = {}

    def ask(number: int, name: str) -> None:
        regions = PROMPTS["a rectangle"].regions(SIZES[name])
        found[number] = name, running.region({"picture": f"/data/upload/1/{name}.png"}, regions)

    threads = [threading.Thread(target=ask, args=(number, name)) for number, name in enumerate([*SIZES] * 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    for name, region in found.values():
        assert region["value"] == alone[name]["value"]


def test_a_user_and_password_are_asked_for_where_they_are_set(folder: Path) -> None:
    with backend(folder, BASIC_AUTH_USER="cat", BASIC_AUTH_PASS="sécret") as running:
        for header in (
            {},
            {"Authorization": "Basic Y2F0OmRvZw=="},
            {"Authorization": "Basic !"},
            {"Authorization": "x"},
        ):
            for path in ("/health", "/predict"):
                assert running.ask(path, None if path == "/health" else {}, header)[0] == 401
        assert running.ask("/predict", {"large": "x" * 5_000_000})[0] == 401  # and not a connection that breaks off
        right = {"Authorization": "Basic " + base64.b64encode("cat:sécret".encode()).decode()}
        assert running.ask("/health", headers=right)[0] == 200


def test_it_ends_when_told_to_and_answers_what_it_was_asked_before(folder: Path) -> None:
    with backend(folder) as running:
        answers: list[Any] = []
        data = {"picture": inline(encoded(scene(2000, 3000)))}
        asking = threading.Thread(
            target=lambda: answers.append(running.predict(data, PROMPTS["a click"].regions((2000, 3000))))
        )
        idle = socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])))
        asking.start()
        time.sleep(0.2)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
        asking.join()
        idle.close()
        assert answers[0][0] == 200


def test_the_readme_is_about_this_model_and_its_configuration_works(folder: Path, running: Process) -> None:
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# Tiny in Label Studio")
    assert FINGERPRINT in readme
    assert "/tiny/server.py" in readme
    assert VERSION in readme
    assert "{" + "{" not in readme
    (config,) = re.findall(r"```xml\n(.*?)```", readme, re.DOTALL)
    for name in re.findall(r"`(\w+\.(?:py|onnx))`", readme):
        assert (folder / name).is_file(), name
    regions = PROMPTS["a rectangle and clicks"].regions(SIZES["square"], "Dog")
    region = running.region({"image": "/data/upload/1/square.png"}, regions, config)
    assert (region["from_name"], region["value"]["brushlabels"]) == ("mask", ["Dog"])


def test_what_cannot_be_started_says_why(folder: Path, tmp_path: Path) -> None:
    def run(*options: str, **environment: str) -> tuple[int, str]:
        command = [sys.executable, str(folder / "server.py"), *options]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    status, said = run("--help")
    assert status == 0
    assert "LABEL_STUDIO_API_KEY" in said
    assert run("--port", "99999")[0] == 1
    assert run("--workers", "0")[0] == 2
    status, said = run("--folder", str(tmp_path))
    assert (status, "encoder.onnx" in said, "Traceback" in said) == (1, True, False)
    status, said = run("--port", "0", LABEL_STUDIO_URL="label-studio:8080")
    assert (status, "is no http(s) URL" in said) == (1, True)


TOKEN = "abcdef0123456789abcdef0123456789abcdef01"
DECODE = """
import json, sys
import numpy as np
from label_studio_sdk.converter.brush import decode_rle

for rle in json.load(sys.stdin):
    print(json.dumps(np.flatnonzero(np.diff(decode_rle(rle).astype(int), prepend=0)).tolist()))
"""
"""Label Studio's own reading of run lengths: where its values change."""


@dataclass
class Studio(Process):
    """A running Label Studio, and the Python that it is installed in."""

    python: Path

    def api(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        status, answer, _ = self.ask(path, body, {"Authorization": f"Token {TOKEN}", **(headers or {})})
        assert status in (200, 201), answer
        return answer

    def decoded(self, rles: list[list[int]], shapes: list[tuple[int, int]]) -> list[np.ndarray]:
        """Brush regions' masks by Label Studio's SDK."""
        command = [str(self.python), "-c", DECODE]
        done = subprocess.run(command, input=json.dumps(rles), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        masks = []
        for line, (height, width) in zip(done.stdout.splitlines(), shapes, strict=True):
            changes = np.zeros(height * width * 4, int)
            changes[json.loads(line)] = 1
            values = (np.cumsum(changes) % 2).reshape(height, width, 4)
            assert (values == values[..., :1]).all()
            masks.append(values[..., 3] > 0)
        return masks


@pytest.fixture(scope="module")
def real_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """Label Studio as it comes from PyPI, with SQLite, allowed to speak with a backend on its own machine."""
    directory = tmp_path_factory.mktemp("studio")
    python = directory / "venv" / "bin" / "python"
    for command in (
        [sys.executable, "-m", "venv", str(directory / "venv")],
        [str(python), "-m", "pip", "install", "--quiet", f"label-studio=={VERSION}"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        if done.returncode:
            pytest.skip(f"Label Studio {VERSION} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    quiet = {"COLLECT_ANALYTICS": "false", "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": "", "LATEST_VERSION_CHECK": "false"}
    command = [str(python.parent / "label-studio"), "start", "--no-browser", "--data-dir", str(directory / "data")]
    command += ["--port", str(port), "--internal-host", "127.0.0.1", "--username", "cat@example.com"]
    command += ["--password", "Secret-1-Secret", "--user-token", TOKEN, "--enable-legacy-api-token"]
    environment = {**os.environ, **quiet, "USE_DEFAULT_BANNED_SUBNETS": "false"}
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
    studio = Studio(f"http://127.0.0.1:{port}", process, python)
    try:
        for _ in range(300):
            with suppress(OSError):
                studio.ask("/health")
                break
            assert process.poll() is None, (directory / "log").read_text()[-3000:]
            time.sleep(1)
        yield studio
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)  # a gigabyte


@pytest.mark.slow
def test_label_studio_stores_the_mask_that_a_click_in_it_made(
    folder: Path, real_studio: Studio, predictor: SamPredictor
) -> None:
    login = {"BASIC_AUTH_USER": "studio", "BASIC_AUTH_PASS": "secret"}
    key = real_studio.api("/api/token/", {})["token"]  # a personal access token
    readme = (folder / "README.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"```xml\n(.*?)```", readme, re.DOTALL)
    project = real_studio.api("/api/projects/", {"title": "clicks", "label_config": config})["id"]
    file = encoded(scene(150, 209), "JPEG", orientation=6)
    head = 'Content-Disposition: form-data; name="file"; filename="a cat.jpg"\r\nContent-Type: image/jpeg'
    form = f"--limit\r\n{head}\r\n\r\n".encode() + file + b"\r\n--limit--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=limit"}
    assert real_studio.api(f"/api/projects/{project}/import", form, kind)["task_count"] == 1
    (task,) = real_studio.api(f"/api/tasks?project={project}")["tasks"]
    assert task["data"]["image"].startswith("/data/upload/")

    with backend(folder, LABEL_STUDIO_URL=real_studio.url, LABEL_STUDIO_API_KEY=key, **login) as running:
        asked = {"url": running.url, "project": project, "title": "student", "is_interactive": True}
        auth = {"auth_method": "BASIC_AUTH", "basic_auth_user": "studio"}
        status, answer, _ = real_studio.ask(
            "/api/ml/", {**asked, **auth, "basic_auth_pass": "wrong"}, {"Authorization": f"Token {TOKEN}"}
        )
        assert (status, "authentication parameters" in str(answer)) == (400, True)
        connected = real_studio.api("/api/ml/", {**asked, **auth, "basic_auth_pass": "secret"})
        assert (connected["state"], connected["model_version"]) == ("CO", FINGERPRINT)
        model = f"/api/ml/{connected['id']}"

        picture = upright(file)
        predictor.set_image(picture)
        stored, expected = [], []
        for clicks in PROMPTS.values():
            context = {"result": clicks.regions(picture.shape[:2], "Dog")}
            answer = real_studio.api(f"{model}/interactive-annotating", {"task": task["id"], "context": context})
            region = answer["data"]["result"][0]
            annotation = {"result": [region], "was_cancelled": False}
            real_studio.api(f"/api/tasks/{task['id']}/annotations/", annotation)
            prediction = {"task": task["id"], "project": project, **answer["data"]}
            real_studio.api("/api/predictions/", prediction)
            stored.append(region["id"])
            expected.append(clicks.expected(predictor))
        wrong = {"result": PROMPTS["a click"].regions(picture.shape[:2], "Cow")}
        refused = real_studio.api(f"{model}/interactive-annotating", {"task": task["id"], "context": wrong})
        assert "has the label 'Cow'; there are Cat, Dog" in refused["errors"][0]

        # Nobody clicked: nothing is stored.
        everything = {"selectedItems": {"all": True, "excluded": []}, "project": project}
        real_studio.api(f"/api/dm/actions?id=retrieve_tasks_predictions&project={project}", everything)
        real_studio.api(f"{model}/train", {})
        assert real_studio.api(f"{model}/versions")["versions"] == [FINGERPRINT]
        assert real_studio.api(model)["state"] == "CO"

    (exported,) = real_studio.api(f"/api/projects/{project}/export?exportType=JSON")
    assert len(exported["annotations"]) == len(PROMPTS)
    predictions = real_studio.api(f"/api/predictions?task={task['id']}")
    assert {each["model_version"] for each in predictions} == {FINGERPRINT}
    for results in (exported["annotations"], predictions):
        regions = {region["id"]: region for each in results for region in each["result"]}
        assert sorted(regions) == sorted(stored)
        shapes = [(regions[name]["original_height"], regions[name]["original_width"]) for name in stored]
        assert set(shapes) == {picture.shape[:2]}
        assert all(region["value"]["brushlabels"] == ["Dog"] for region in regions.values())
        found = real_studio.decoded([regions[name]["value"]["rle"] for name in stored], shapes)
        assert min(map(mask_iou, found, expected)) >= 0.99


@pytest.mark.slow
def test_label_studios_sdk_decodes_any_mask(folder: Path, real_studio: Studio) -> None:
    masks = awkward_masks()
    rles = encoded_by(folder, masks)
    for mask, found in zip(masks, real_studio.decoded(rles, [mask.shape for mask in masks]), strict=True):
        np.testing.assert_array_equal(found, mask)
