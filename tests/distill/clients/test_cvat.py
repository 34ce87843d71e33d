"""What `export/cvat/` holds, at work as CVAT has it work: the function behind HTTP with Nuclio's own types, the decoder
in JavaScript with the inputs that CVAT's plugin makes, and the agent under `cvat-cli`. `SamPredictor` says what it has
to come to. Nuclio's and CVAT's packages, ONNX Runtime and nothing of PyTorch lie in an environment of their own."""

import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import helper
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from distill.clients import segmenter as segmenter_module
from distill.clients.segmenter import BadPicture, Segmenter, read_picture, resized
from distill.evaluate.ious import mask_iou
from distill.export.encoder import RgbEncoder
from distill.export.onnx import decoder_model, encoder_model, low_res_model
from embeddings_cache.images.scenes import generate_scene
from npm import needs_node, npm_install
from published import read_peer, weights_by_rule
from students import load_checkpoint
from students.sam import untrained_sam
from support import CHROMIUM, ROOT

SOURCE = ROOT / "distill" / "clients" / "cvat"
FINGERPRINT = "f0e1d2c3b4a59687"
NAMES = {"name": "tiny_vit_5m", "title": "TinyViT-5M", "fingerprint": FINGERPRINT}
STOCK = "pth-facebookresearch-sam-vit-h"
"""The one function that the plugin of CVAT's pages knows."""

PACKAGES = ("nuclio-sdk", "cvat-cli>=2.73", "cvat-sdk[masks]>=2.73", "onnxruntime", "numpy", "pillow")
RUNTIMES = {"web-1.14": "onnxruntime-web@1.14.0", "web": "onnxruntime-web@1.30.0"}
SIZES = {"landscape": (427, 640), "portrait": (701, 467), "square": (512, 512)}
"""Height and width."""


SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
import nuclio_sdk
from nuclio_sdk.event import Event, EventDeserializerKinds
import main

assert "torch" not in sys.modules
logger = nuclio_sdk.Logger(level=30)
logger.set_handler("default", sys.stderr, nuclio_sdk.logger.HumanReadableFormatter())
context = nuclio_sdk.Context(logger, worker_id=0)
main.init_context(context)

class Worker(BaseHTTPRequestHandler):
    def do_POST(self):
        message = dict.fromkeys((b"fields", b"headers"), {}) | dict.fromkeys(
            (b"id", b"method", b"path", b"url", b"type", b"type_version", b"version"), "") | dict.fromkeys(
            (b"size", b"timestamp", b"shard_id", b"num_shards"), 0) | {b"trigger": {b"kind": "http", b"name": "http"},
            b"content_type": self.headers.get("Content-Type", "").encode(),
            b"body": self.rfile.read(int(self.headers["Content-Length"]))}
        event = Event.deserialize(message, EventDeserializerKinds.msgpack_raw)
        answer = nuclio_sdk.Response.from_entrypoint_output(json.dumps, main.handler(context, event))
        self.send_response(answer["status_code"])
        self.send_header("Content-Type", answer["content_type"])
        self.end_headers()
        self.wfile.write(answer["body"].encode())

    def log_message(self, *arguments): pass

server = HTTPServer(("127.0.0.1", 0), Worker)
print(server.server_port, flush=True)
server.serve_forever()
"""
"""A Nuclio worker: one event after the other, as its wrapper unpacks and answers them."""

PLUGIN = """
const encoded = ({ data }) => btoa(Array.from(data, (byte) => String.fromCharCode(byte)).join(""));

export async function plugin(ort, asked, read) {
  if (ort.env?.wasm) ort.env.wasm.numThreads = 1;
  const results = [];
  for (const { decoder, blob, width, height, steps } of asked) {
    const session = await ort.InferenceSession.create(await read(decoder));
    const embedding = new Float32Array(Uint8Array.from(atob(blob), (letter) => letter.charCodeAt(0)).buffer);
    const scale = 1024 / Math.max(width, height);
    let seen = [];
    let earlier = null;
    for (const { box, on, off } of steps) {
      const prompt = [
        ...box.map(([x, y], corner) => ({ x, y, label: 2 + corner })),
        ...on.map(([x, y]) => ({ x, y, label: 1 })),
        ...off.map(([x, y]) => ({ x, y, label: 0 })),
      ];
      const mask = JSON.stringify(prompt.slice(0, -1)) === JSON.stringify(seen) ? earlier : null;
      const coords = Float32Array.from(prompt.flatMap(({ x, y }) => [x * scale, y * scale]));
      const made = await session.run({
        image_embeddings: new ort.Tensor("float32", embedding, [1, 256, 64, 64]),
        point_coords: new ort.Tensor("float32", coords, [1, prompt.length, 2]),
        point_labels: new ort.Tensor("float32", prompt.map(({ label }) => label), [1, prompt.length]),
        orig_im_size: new ort.Tensor("float32", [height, width]),
        mask_input: new ort.Tensor("float32", mask ?? new Float32Array(256 * 256), [1, 1, 256, 256]),
        has_mask_input: new ort.Tensor("float32", [mask ? 1 : 0]),
      });
      const bounds = ["xtl", "ytl", "xbr", "ybr"].map((name) => Number(made[name].data[0]));
      const { dims, type } = made.masks;
      results.push({ again: mask !== null, bounds, dims, type, mask: encoded(made.masks) });
      seen = prompt;
      earlier = Float32Array.from(made.low_res_masks.data);
    }
  }
  return results;
}
"""
"""What CVAT's plugin does between a click and a mask: no padding point, coordinates that are not rounded, and the last
low-resolution mask where all prompts but the newest are those of the last time."""

IN_NODE = """
import { readFileSync, writeFileSync } from "node:fs";
import * as module from "RUNTIME";
import { plugin } from "./plugin.mjs";

const read = async (file) => Uint8Array.from(readFileSync(file));
const results = await plugin(module.default ?? module, JSON.parse(readFileSync("asked.json")), read);
writeFileSync("answered.json", JSON.stringify(results));
"""

IN_A_PAGE = """<!doctype html>
<script src="node_modules/RUNTIME/dist/ort.min.js"></script>
<script type="module">
  import { plugin } from "./plugin.mjs";
  const read = async (file) => new Uint8Array(await (await fetch(file)).arrayBuffer());
  ort.env.wasm.wasmPaths = new URL("node_modules/RUNTIME/dist/", location).href;
  const asked = await (await fetch("asked.json")).json();
  const results = await plugin(ort, asked, read).catch((error) => ({ error: String(error) }));
  await fetch("answered.json", { method: "POST", body: JSON.stringify(results) });
</script>
"""


class Pages(SimpleHTTPRequestHandler):
    """Hands out a folder, and keeps what is posted."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Path(self.directory, "answered.json").write_bytes(body)
        self.send_response(204)
        self.end_headers()
        self.server.answered.set()  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        pass


def run_in_node(folder: Path, runtime: str) -> Any:
    (folder / "run.mjs").write_text(IN_NODE.replace("RUNTIME", runtime))
    done = subprocess.run(["node", "run.mjs"], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answered.json").read_text())


def run_in_chromium(folder: Path, runtime: str) -> Any:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    (folder / "index.html").write_text(IN_A_PAGE.replace("RUNTIME", runtime))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Pages, directory=str(folder))) as server:
        server.answered = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = [f"--user-data-dir={folder / 'profile'}", "--disable-background-networking", "--no-first-run"]
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *flags, "--remote-debugging-port=0"]
        browser = subprocess.Popen(
            [*command, f"http://127.0.0.1:{server.server_port}/"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            assert server.answered.wait(300)  # type: ignore[attr-defined]
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    return json.loads((folder / "answered.json").read_text())


@dataclass(frozen=True)
class Step:
    """What an annotator has given so far, in pixels of the picture: a box's corners, clicks on and off the object."""

    box: list[list[float]] = field(default_factory=list)
    on: list[list[float]] = field(default_factory=list)
    off: list[list[float]] = field(default_factory=list)

    def prompt(self) -> dict[str, np.ndarray]:
        """As `SamPredictor.predict` takes it."""
        points = np.array([*self.on, *self.off], np.float64).reshape(-1, 2)
        given: dict[str, np.ndarray] = {}
        if self.on or self.off or not self.box:
            given = {"point_coords": points, "point_labels": np.array([1] * len(self.on) + [0] * len(self.off))}
        return given | ({"box": np.array(self.box).ravel()} if self.box else {})

    def is_ambiguous(self) -> bool:
        """Whether one of three masks is asked for."""
        return len(self.on) + len(self.off) + 2 * len(self.box) <= 1


def steps(height: int, width: int) -> list[Step]:
    """A session of clicks, then one with a box: none, one to three on the object, one beside it; a box, and clicks."""
    one, two, three, beside = ([x * width, y * height] for x, y in ((0.41, 0.52), (0.7, 0.6), (0.3, 0.8), (0.9, 0.1)))
    box = [[0.2 * width, 0.1 * height], [0.8 * width, 0.9 * height]]
    clicks = [Step(on=[one]), Step(on=[one, two]), Step(on=[one, two, three]), Step(on=[one, two, three], off=[beside])]
    return [*clicks, Step(), Step(off=[beside]), Step(box), Step(box, [one]), Step(box, [one], [beside])]


def picture(height: int, width: int, seed: int = 3) -> np.ndarray:
    scene, _ = generate_scene(np.random.default_rng(seed), 1000)
    return np.ascontiguousarray(np.tile(scene, (2, 2, 1))[:height, :width])


def png(image: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    held = BytesIO()
    Image.fromarray(image).save(held, kind, **options)
    return held.getvalue()


def white(side: int) -> bytes:
    """A PNG of a few kB with so many pixels."""
    held = BytesIO()
    Image.new("1", (side, side), 1).save(held, "PNG")
    return held.getvalue()


def in_json(encoded: bytes, **more: Any) -> bytes:
    return json.dumps({"image": base64.b64encode(encoded).decode(), **more}).encode()


def render(directory: Path, models: Path) -> Path:
    """A folder as an export makes it."""
    settings = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    jinja = jinja2.Environment(undefined=jinja2.StrictUndefined, **settings)  # type: ignore[arg-type]
    directory.mkdir(parents=True)
    for file in SOURCE.iterdir():
        if file.suffix == ".jinja":
            (directory / file.stem).write_text(jinja.from_string(file.read_text("utf-8")).render(NAMES), "utf-8")
        elif file.is_file():
            shutil.copy(file, directory)
    shutil.copy(SOURCE.parent / "segmenter.py", directory)
    for name in ("encoder.onnx", "decoder.onnx"):
        if (models / name).exists():
            os.link(models / name, directory / name)
    return directory


def save(model: onnx.ModelProto, path: Path, fingerprint: str = FINGERPRINT) -> None:
    del model.metadata_props[:]
    helper.set_model_props(model, {"fingerprint": fingerprint})
    onnx.save(model, path)


@pytest.fixture(scope="module")
def client_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoder.onnx` and `decoder.onnx` of `mobile_sam.pt`, a MobileSAM with drawn weights."""
    directory = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        decoder = untrained_sam(torch.nn.Identity()).state_dict()
    torch.save({**weights_by_rule(read_peer("mobile_sam")), **decoder}, directory / "mobile_sam.pt")
    sam = load_checkpoint(directory / "mobile_sam.pt").eval()
    save(encoder_model(RgbEncoder(sam.image_encoder).eval()), directory / "encoder.onnx")
    save(decoder_model(low_res_model(sam, single=True), crop=True), directory / "decoder.onnx")
    return directory


@pytest.fixture(scope="module")
def sam(client_models: Path) -> Sam:
    return load_checkpoint(client_models / "mobile_sam.pt").eval()


@pytest.fixture(scope="module")
def folder(client_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(tmp_path_factory.mktemp("export") / "cvat", client_models)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with what Nuclio's and the agent's environments hold, and no PyTorch."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=True)
    found = directory / "bin" / "python"
    done = subprocess.run([found, "-m", "pip", "install", "-q", *PACKAGES], capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"cannot be installed: {done.stderr[-300:]}")
    return found


@contextmanager
def running(python: Path, folder: Path, **settings: str) -> Iterator[tuple[str, int]]:
    """The function at work; yields its address and process."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "SAM_THREADS": "1", **settings}
    process = subprocess.Popen([python, "-c", SERVER], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, f"the function did not start: exit code {process.wait(30)}"
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.kill()
        process.wait()


def ask(address: str, body: bytes, content_type: str = "application/json") -> tuple[int, dict[str, str]]:
    request = urllib.request.Request(address, body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def embedding_in(answer: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(answer["blob"], validate=True), "<f4").reshape(1, 256, 64, 64)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def resident(process: int) -> float:
    """Memory of a process in MB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def cpu_seconds(process: int) -> float:
    """What a process has worked, whatever works beside it."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def hostile() -> dict[str, bytes]:
    """Bodies that are no request, or hold no picture."""
    good = png(picture(60, 80), "JPEG")
    return {
        "nothing": b"",
        "no JSON": b"\xff\xfe{",
        "JSON cut short": in_json(good)[:-40],
        "a list": b"[1, 2]",
        "a number": b"7",
        "a text": b'"image"',
        "no image": b'{"threshold": 0.5}',
        "no text": b'{"image": 5}',
        "null": b'{"image": null}',
        "nested": b'{"image": {"image": "AAAA"}}',
        "deep": b'{"image": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "a huge number": b'{"image": ' + b"9" * 10_000 + b"}",
        "no base64": b'{"image": "!!!!"}',
        "half base64": b'{"image": "AAAAA"}',
        "other letters": '{"image": "Ä"}'.encode(),
        "no picture": in_json(b"hello"),
        "empty picture": in_json(b""),
        "cut short": in_json(good[:300]),
        "PNG cut short": in_json(png(picture(60, 80))[:-200]),
        "too large": in_json(white(11_000)),
        "a bomb": in_json(white(20_000)),
        "elongated": in_json(png(picture(1, 1000).repeat(4, axis=1))),
        "vector graphics": in_json(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"),
    }


@pytest.mark.parametrize(("file", "workers"), [("function.yaml", 2), ("function-gpu.yaml", 1)])
def test_the_functions_are_what_cvat_reads(tmp_path: Path, file: str, workers: int) -> None:
    """The fields of CVAT's own for SAM, by the types that its server casts them to."""
    function = yaml.safe_load((render(tmp_path / "cvat", tmp_path) / file).read_text("utf-8"))
    assert function["metadata"]["name"] == STOCK
    annotations = function["metadata"]["annotations"]
    assert (annotations["name"], annotations["type"], annotations["spec"]) == ("TinyViT-5M", "interactor", None)
    assert (annotations["version"], annotations["min_pos_points"], annotations["min_neg_points"]) == (2, 0, 0)
    assert annotations["startswith_box_optional"] is True
    spec = function["spec"]
    assert (spec["runtime"], spec["handler"]) == ("python:3.11", "main:handler")
    assert FINGERPRINT in spec["description"]
    (trigger,) = spec["triggers"].values()
    assert (trigger["kind"], trigger["numWorkers"]) == ("http", workers)
    assert ("resources" in spec) == ("gpu" in file)
    assert all(isinstance(entry["value"], str) for entry in spec["env"])
    installed = " ".join(step["value"] for step in spec["build"]["directives"]["preCopy"])
    assert ("onnxruntime-gpu" in installed) == ("gpu" in file)
    assert "torch" not in installed


def test_the_readme_names_every_file_and_setting(tmp_path: Path) -> None:
    folder = render(tmp_path / "cvat", tmp_path)
    readme = (folder / "README.md").read_text("utf-8")
    assert not re.search(r"\{\{|\{%", readme)
    for file in folder.iterdir():
        assert f"`{file.name}`" in readme or file.name == "README.md"
    for variable in re.findall(r"SAM_[A-Z_]+", (folder / "main.py").read_text("utf-8")):
        assert f"`{variable}`" in readme


def test_no_picture_is_found_in_what_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmenter", segmenter_module)
    spec = importlib.util.spec_from_file_location("cvat_main", SOURCE / "main.py")
    assert spec is not None
    assert spec.loader is not None
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    good = png(picture(30, 40))
    for body in (in_json(good, frame=1), in_json(good).decode(), json.loads(in_json(good))):
        assert read_picture(main.picture_in(body), upright=False).size == (40, 30)
    for name, body in hostile().items():
        with pytest.raises((main.BadRequest, BadPicture)):
            pytest.fail(f"{name}: {resized(read_picture(main.picture_in(body)).size, 1024)}")


@pytest.mark.slow
def test_check_says_what_belongs_together(client_models: Path, folder: Path, tmp_path: Path) -> None:
    def check(*arguments: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(folder / "check.py"), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    done = check()
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"encoder and decoder are of one model, {FINGERPRINT}, .* 640×480 px took .*\n", done.stdout)
    assert check(client_models / "decoder.onnx").returncode == 0

    decoder = onnx.load(client_models / "decoder.onnx")
    save(decoder, tmp_path / "other.onnx", "0123456789abcdef")
    del decoder.metadata_props[:]
    onnx.save(decoder, tmp_path / "unknown.onnx")
    (tmp_path / "damaged.onnx").write_bytes((client_models / "decoder.onnx").read_bytes()[:5000])
    for name, reason in {
        "other": f"of model {FINGERPRINT}, .* of 0123456789abcdef",
        "unknown": "has no fingerprint",
        "damaged": "cannot be opened",
        "gone": "is not there",
    }.items():
        done = check(tmp_path / f"{name}.onnx")
        assert (done.returncode, done.stdout) == (1, "")
        assert re.search(reason, done.stderr)
        assert "Traceback" not in done.stderr
    done = check(client_models / "encoder.onnx")
    assert done.returncode == 1
    assert "takes embeddings of" in done.stderr


@pytest.mark.slow
def test_files_of_two_models_are_not_served(client_models: Path, python: Path, tmp_path: Path) -> None:
    folder = render(tmp_path / "cvat", client_models)
    (folder / "decoder.onnx").unlink()
    save(onnx.load(client_models / "decoder.onnx"), folder / "decoder.onnx", "0123456789abcdef")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([python, "-c", SERVER], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"encoder.onnx is of {FINGERPRINT}, decoder.onnx of 0123456789abcdef: not one model" in done.stderr


@pytest.mark.slow
def test_the_function_answers_with_pytorchs_embedding(folder: Path, sam: Sam, python: Path) -> None:
    predictor = SamPredictor(sam)
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = {name: picture(*size) for name, size in SIZES.items()}
    with running(python, folder) as (address, _):
        for image in pictures.values():
            predictor.set_image(image)
            expected = predictor.features.numpy()
            clicks = {"pos_points": [[3, 4]], "neg_points": [], "obj_bbox": None, "threshold": 0.5}
            status, answer = ask(address, in_json(png(image), **clicks))
            assert (status, set(answer)) == (200, {"blob"})
            assert relative_error(embedding_in(answer), expected) < 1e-4
            for body, kind in (  # EXIF is not heeded; Nuclio leaves JSON of another type to the handler
                (in_json(png(image, exif=turned)), "application/json"),
                (in_json(png(image)), "application/json; charset=utf-8"),
            ):
                status, answer = ask(address, body, kind)
                assert status == 200
                assert relative_error(embedding_in(answer), expected) < 1e-4


@pytest.mark.slow
def test_nothing_that_is_sent_ends_the_worker(folder: Path, python: Path) -> None:
    good = in_json(png(picture(60, 80)))
    with running(python, folder) as (address, _):
        status, first = ask(address, good)
        assert status == 200
        for name, body in hostile().items():
            for kind in ("application/json", "text/plain"):
                status, answer = ask(address, body, kind)
                assert status == 400, name
                assert set(answer) == {"message"}, name
                assert 0 < len(answer["message"]) < 300, name
        assert ask(address, good) == (200, first)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_embedding_is_kept_by_its_pictures_content(folder: Path, python: Path) -> None:
    pictures = [in_json(png(picture(60, 80, seed)), frame=seed) for seed in range(3)]

    with running(python, folder, SAM_CACHE_MB="9") as (address, process):  # two embeddings of 4 MB

        def work(body: bytes) -> tuple[float, dict[str, str]]:
            before = cpu_seconds(process)
            status, answer = ask(address, body)
            assert status == 200
            return cpu_seconds(process) - before, answer

        encoding, first = work(pictures[0])
        other = json.dumps({"frame": 1, "pos_points": [], **json.loads(pictures[0])}).encode()
        finding, again = work(other)
        assert again == first
        assert finding < encoding / 3
        assert work(pictures[1])[1] != first
        work(pictures[2])
        assert work(pictures[2])[0] < encoding / 3
        assert work(pictures[0])[0] > encoding / 3  # it had to go


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_over_a_hundred_requests(folder: Path, python: Path) -> None:
    """Of two requests in ten the picture is new, in seven it is that of the one before, and one holds none."""
    bad = list(hostile().values())
    rng = np.random.default_rng(0)
    sizes = []
    with running(python, folder, SAM_CACHE_MB="16") as (address, process):
        for number in range(100):
            if number % 10 == 9:
                assert ask(address, bad[number // 10 % len(bad)])[0] == 400
                continue
            if number % 5 == 0:
                height, width = rng.integers(40, 900, 2)
                body = in_json(png(picture(height, width, number), "JPEG"))
            assert ask(address, body)[0] == 200
            sizes.append(resident(process))
    print(f"resident: {sizes[0]:.0f} MB at first, {max(sizes[:30]):.0f} at most in 30, {max(sizes):.0f} in all")
    assert max(sizes[30:]) < max(sizes[:30]) + 40


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """ONNX Runtime for browsers, as old as CVAT once had it and new, and for Node."""
    directory = tmp_path_factory.mktemp("npm")
    yield npm_install(directory, *(f"{alias}@npm:{package}" for alias, package in RUNTIMES.items()))
    shutil.rmtree(directory)  # half a gigabyte


@pytest.fixture(scope="module")
def empty_decoder(client_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder with logits so low that no mask has a pixel."""
    model = onnx.load(client_models / "decoder.onnx")
    (maker,) = (node for node in model.graph.node if "low_res_masks" in node.output)
    maker.output[:] = ["raised" if name == "low_res_masks" else name for name in maker.output]
    model.graph.initializer.append(helper.make_tensor("so_low", onnx.TensorProto.FLOAT, [], [1e4]))
    place = list(model.graph.node).index(maker) + 1
    model.graph.node.insert(place, helper.make_node("Sub", ["raised", "so_low"], ["low_res_masks"]))
    path = tmp_path_factory.mktemp("empty") / "decoder.onnx"
    onnx.save(model, path)
    return path


@dataclass(frozen=True)
class Expected:
    """`SamPredictor`'s mask (H, W) of a step, and its low-resolution logits (1, 256, 256)."""

    mask: np.ndarray
    low_res: np.ndarray


def predicted(predictor: SamPredictor, step: Step, earlier: np.ndarray | None) -> Expected:
    again = {} if earlier is None else {"mask_input": earlier}
    masks, ious, low_res = predictor.predict(**step.prompt(), **again, multimask_output=step.is_ambiguous())
    best = int(ious.argmax())
    return Expected(masks[best], low_res[best : best + 1])


def bounds_of(mask: np.ndarray) -> list[int]:
    """First and last column and row: left, top, right, bottom."""
    rows, columns = np.nonzero(mask)
    return [int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())]


@pytest.mark.slow
@needs_node
@pytest.mark.parametrize(
    ("run", "runtime"),
    [(run_in_node, "web-1.14"), (run_in_chromium, "web")],
)
def test_cvats_plugin_makes_the_predictors_masks(
    folder: Path,
    sam: Sam,
    empty_decoder: Path,
    node_modules: Path,
    tmp_path: Path,
    run: Callable[[Path, str], Any],
    runtime: str,
) -> None:
    segmenter = Segmenter(folder)
    asked = []
    for size in SIZES.values():
        embedding, _ = segmenter.look(png(picture(*size)), upright=False)
        blob = base64.b64encode(embedding.tobytes()).decode()
        shown = [vars(step) for step in steps(*size)]
        place = {"blob": blob, "height": size[0], "width": size[1]}
        asked.append({"decoder": "decoder.onnx", "steps": shown, **place})
    asked.append({"decoder": "empty.onnx", "steps": shown[:2], **place})
    (tmp_path / "node_modules").symlink_to(node_modules)
    (tmp_path / "decoder.onnx").symlink_to(folder / "decoder.onnx")
    (tmp_path / "empty.onnx").symlink_to(empty_decoder)
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    (tmp_path / "plugin.mjs").write_text(PLUGIN)
    answered = run(tmp_path, runtime)
    assert isinstance(answered, list), answered
    answers = iter(answered)

    predictor = SamPredictor(sam)
    ious, shares, again = [], [], 0
    for size in SIZES.values():
        predictor.set_image(picture(*size))
        earlier: np.ndarray | None = None
        for step, answer in zip(steps(*size), answers, strict=False):
            again += answer["again"]
            expected = predicted(predictor, step, earlier if answer["again"] else None)
            found = whole_mask(answer, size)
            ious.append(mask_iou(found, expected.mask))
            shares.append(expected.mask.mean())
            assert answer["bounds"] == bounds_of(found)
            if np.array_equal(found, expected.mask):
                assert answer["bounds"] == bounds_of(expected.mask)
            earlier = expected.low_res
    print(f"{runtime}: least IoU {min(ious):.4f}, shares {min(shares):.2f} to {max(shares):.2f}, {again} with a mask")
    assert min(ious) >= 0.99
    assert again == 6 * len(SIZES)
    assert 0.02 < np.median(shares) < 0.98
    for answer in answers:  # an empty mask is one pixel 0, which the plugin takes for no object
        assert (answer["dims"], answer["bounds"]) == ([1, 1, 1, 1], [0, 0, 0, 0])
        assert base64.b64decode(answer["mask"]) == b"\0"


def whole_mask(answer: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """A cropped mask in its place: boolean (H, W)."""
    left, top, right, bottom = answer["bounds"]
    assert answer["type"] == "uint8"
    assert answer["dims"] == [1, 1, bottom - top + 1, right - left + 1]
    crop = np.frombuffer(base64.b64decode(answer["mask"]), np.uint8).reshape(answer["dims"][2:])
    assert set(np.unique(crop)) <= {0, 1}
    mask = np.zeros(size, bool)
    mask[top : bottom + 1, left : right + 1] = crop > 0
    return mask


class Cvat(ThreadingHTTPServer):
    """What an agent asks of CVAT's server: a function, its queue of requests, and a task of one frame.

    Args:
        frame: a file's bytes.
        requests: parameters of annotation requests.
    """

    def __init__(self, frame: bytes, requests: list[dict[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), CvatRequest)
        self.frame, self.waiting = frame, list(enumerate(requests))
        self.function: dict[str, Any] = {}
        self.results: dict[str, Any] = {}
        self.frames_sent = 0


class CvatRequest(BaseHTTPRequestHandler):
    """One request to it."""

    server: Cvat
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        pages = {
            "/api/server/about": {
                "name": "CVAT", "description": "", "version": "2.80.0", "logo_url": "", "subtitle": "",
            },
            "/api/functions/1": self.server.function,
            "/api/tasks/7": {
                "id": 7, "name": "a task", "organization": 1, "size": 1, "updated_date": "2026-11-30T00:00:00Z",
                "data_chunk_size": 1, "data_original_chunk_type": "imageset",
                "jobs": {"count": 1, "completed": 0, "validation": 0}, "labels": {"url": ""},
            },
            "/api/labels": {"count": 0, "next": None, "previous": None, "results": []},
            "/api/tasks/7/data/meta": {
                "chunks_updated_date": "2026-11-30T00:00:00Z", "deleted_frames": [],
                "frames": [{"name": "frame.png", "width": 1, "height": 1, "related_files": 0}],
            },
        }  # fmt: skip
        path = self.path.split("?")[0].rstrip("/")
        if path == "/api/tasks/7/data":
            self.server.frames_sent += 1
            self.reply(self.server.frame, "image/png")
        else:
            self.reply(json.dumps(pages[path]).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/functions":
            self.server.function = {"startswith_box": False, "startswith_box_optional": False, **body, "id": 1}
            self.reply(json.dumps(self.server.function).encode())
        elif self.path.endswith("/requests/acquire"):
            wanted = body["request_category"] == "interactive" and self.server.waiting
            number, request = self.server.waiting.pop(0) if wanted else (None, None)
            given = None if request is None else {"ar_id": str(number), "ar_params": request}
            self.reply(json.dumps({"ar_assignment": given}).encode())
        else:
            *_, asked, outcome = self.path.split("/")
            self.server.results[asked] = body["shapes"] if outcome == "complete" else body["exc_info"]
            self.reply(b"{}")

    def reply(self, body: bytes, kind: str = "application/vnd.cvat+json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


DECODE = """
import json, sys
import numpy as np
from cvat_sdk.masks import decode_mask

height, width, *encoded = json.load(sys.stdin)
np.save(sys.argv[1], [decode_mask(points, image_width=width, image_height=height) for points in encoded])
"""
"""Masks as CVAT's own package reads them."""


@pytest.mark.slow
def test_the_agent_makes_the_predictors_masks(folder: Path, sam: Sam, python: Path, tmp_path: Path) -> None:
    """`cvat-cli` registers the function and works off a queue with it."""
    size = SIZES["landscape"]
    image = picture(*size)
    asked = [step for step in steps(*size) if step != Step()]
    requests = [
        {"type": "interact", "task": 7, "frame": 0, "pos_points": step.on, "neg_points": step.off, "obj_bbox": step.box}
        for step in [*asked, Step()]
    ]
    server = Cvat(png(image), requests)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "CVAT_ACCESS_TOKEN": "token", "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}

    def cvat_cli(*arguments: str) -> str:
        host = ("--server-host", f"http://127.0.0.1:{server.server_port}")
        options = ("--function-file", str(folder / "agent.py"), "-p", "threads=int:1")
        command = [str(python), "-m", "cvat_cli", *host, "function", *arguments, *options]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    try:
        number = cvat_cli("create-native", "TinyViT-5M")
        assert (server.function["kind"], server.function["provider"]) == ("interactor", "native")
        assert server.function["startswith_box_optional"] is True
        cvat_cli("run-agent", number, "--burst")
    finally:
        server.shutdown()
        server.server_close()

    assert list(server.results) == [str(number) for number in range(len(requests))]
    assert server.frames_sent == 1  # its embedding is kept
    *answers, nothing = server.results.values()
    assert nothing == []
    shapes = [shape for answer in answers for shape in answer]
    assert [shape["type"] for shape in shapes] == ["mask"] * len(asked)
    for shape in shapes:
        (confidence,) = shape["attributes"]
        assert confidence["spec_id"] == 0
        assert 0 <= float(confidence["value"]) <= 1
    given = json.dumps([*size, *(shape["points"] for shape in shapes)])
    subprocess.run([python, "-c", DECODE, tmp_path / "masks.npy"], input=given, text=True, check=True, timeout=60)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    segmenter = Segmenter(folder, threads=1)
    embedding = segmenter.embed(Image.fromarray(image))
    for step, mask in zip(asked, np.load(tmp_path / "masks.npy"), strict=True):
        labels = [1] * len(step.on) + [0] * len(step.off)
        box = [side for corner in step.box for side in corner] or None
        np.testing.assert_array_equal(
            mask, segmenter.segment(embedding, size[::-1], [*step.on, *step.off], labels, box).mask
        )
        assert mask_iou(mask, predicted(predictor, step, None).mask) >= 0.99
