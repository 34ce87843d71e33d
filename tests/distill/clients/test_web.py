"""`export/web/`: whole, and at work in headless Chromium, which `SamPredictor` says what it has to come to."""

import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

from browser import ISOLATED, NO_GPU, SHIFT, SOFTWARE_WEBGPU, Browser, StaticServer, browsing, served, until
from distill.clients import write_client
from distill.evaluate.ious import mask_iou
from distill.export.runtime import browser_runtime
from distill.main import main
from embeddings_cache.images import generate_scene
from exports import SIZE, small_student, toy
from students import InputError, build_student_sam, save_student
from support import CHROMIUM, TINY, places

NAMES: dict[str, str | int] = {"name": "repvit", "title": "RepViT <b>", "fingerprint": "f0e1d2c3b4a59687", "size": SIZE}

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the project itself puts there."""
    folder = tmp_path_factory.mktemp("texts")
    write_client("web", folder, NAMES)
    return {path.name: path.read_text("utf-8") for path in folder.iterdir()}


MADE = {"model.json", "example.png", "encoder.onnx", "encoder_fp16.onnx", "decoder_batch.onnx"}


def test_every_file_that_a_file_names_is_there(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        for module in re.findall(r'from "\./([^"]+)"', text):
            assert module in texts, f"{name} imports {module}"
    for place in re.findall(r'(?:src|href)="([^"#:]+)"', texts["index.html"]):
        assert place in texts
    identities = set(re.findall(r'id="([^"]+)"', texts["index.html"]))
    for name in ("app.mjs", "controls.mjs"):
        assert set(re.findall(r'\$\("([^"]+)"\)', texts[name])) <= identities
    assert set(re.findall(r'href="#([^"]+)"', texts["index.html"])) <= identities


def test_the_readme_names_every_file(texts: dict[str, str]) -> None:
    for name in {*texts, *MADE} - {"README.md"}:
        assert f"`{name}`" in texts["README.md"], name


def test_nothing_points_elsewhere(texts: dict[str, str]) -> None:
    """No address but this machine's and that of the SVG name space; the policy allows none either."""
    assert "<b>" not in texts["index.html"]
    for name in set(texts) - {"README.md", "LICENSE-onnxruntime-web.txt"}:
        code = re.sub(r"//[^\n]*", "", texts[name]) if name.endswith(".mjs") else texts[name]
        found = set(re.findall(r"https?://[\w.]+", code))
        assert found <= {"http://www.w3.org", "http://localhost"}, name
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', texts["index.html"])
    assert "default-src 'none'" in policy
    assert not re.search(r"unsafe-(inline|eval)'(?<!wasm-unsafe-eval')|https?:|\*", policy)


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a student that has learnt some scenes by heart."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    try:
        browser_runtime(print)
    except InputError as error:
        pytest.skip(str(error))
    place = tmp_path_factory.mktemp("web")
    save_student(place / "s.safetensors", small_student(), {"steps": "80"})
    asked = [*TINY, *places(place, "gone.tar"), "stage=export", f"checkpoint={place / 's.safetensors'}"]
    thresholds = ["predict.pred_iou_thresh=0.6", "predict.stability_score_thresh=0.7", "predict.points_per_side=8"]
    assert main([*asked, *thresholds, "export.formats=[web]"]) == 0
    return place / "run" / "export" / "web"


@pytest.fixture(scope="module")
def predictor() -> SamPredictor:
    return SamPredictor(build_student_sam(small_student(), toy()))


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, list[np.ndarray]]:
    """One of those that it has learnt, and what is in it."""
    return generate_scene(np.random.default_rng(0), SIZE)


class Page:
    """The page in a browser: its picture, and what it says and saves."""

    def __init__(self, browser: Browser, server: StaticServer, downloads: Path) -> None:
        self.browser, self.server, self.downloads = browser, server, downloads
        browser.downloads_to(downloads)

    def load(self, query: str = "") -> None:
        self.browser.open(self.server.address + query)
        self.wait("empty")

    def wait(self, *states: str) -> None:
        wanted = json.dumps(states)
        self.browser.wait_for(f"{wanted}.includes(document.body.dataset.state)")

    def show(self, picture: Path | np.ndarray) -> None:
        if isinstance(picture, np.ndarray):
            path = self.downloads.parent / "scene.png"
            Image.fromarray(picture).save(path)
            picture = path
        self.browser.choose("#file", picture)
        until(lambda: self.text("status").startswith("Click on"))
        self.wait("ready")

    def text(self, identity: str) -> str:
        return self.browser.evaluate(f"document.getElementById('{identity}').textContent")

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a pixel of the picture is in the window."""
        left, top, width, height = self.browser.evaluate(
            "(({ left, top, width, height }) => [left, top, width, height])"
            "(document.getElementById('marks').getBoundingClientRect())"
        )
        columns, rows = map(int, self.text("size").split(" × "))
        return left + x / columns * width, top + y / rows * height

    def settle(self) -> None:
        """Wait until what was asked for is shown."""
        self.browser.wait_for("document.getElementById('marks').ariaBusy === 'false'")

    def shown(self) -> np.ndarray:
        """The mask that is seen, at the size that the picture is shown at."""
        script = """(() => {
          const { width, height } = document.getElementById("mask");
          const { data } = document.getElementById("mask").getContext("2d").getImageData(0, 0, width, height);
          let text = "";
          for (let i = 3; i < data.length; i += 4) text += data[i] ? "1" : "0";
          return [width, height, text];
        })()"""
        width, height, text = self.browser.evaluate(script)
        return (np.frombuffer(text.encode(), np.uint8) == ord("1")).reshape(height, width)

    def shown_small(self) -> np.ndarray:
        """Likewise at the picture's own size."""
        columns, rows = map(int, self.text("size").split(" × "))
        shown = self.shown()
        ys = ((np.arange(rows) + 0.5) * shown.shape[0] / rows).astype(int)
        xs = ((np.arange(columns) + 0.5) * shown.shape[1] / columns).astype(int)
        return shown[np.ix_(ys, xs)]

    def saved(self, key: str, name: str) -> bytes:
        path = self.downloads / name
        path.unlink(missing_ok=True)
        self.browser.press(key)
        return until(lambda: path.exists() and path.read_bytes())

    def saved_mask(self) -> np.ndarray:
        """As PNG."""
        return np.asarray(Image.open(io.BytesIO(self.saved("s", "scene_mask.png")))) > 0


@pytest.fixture(params=[pytest.param({}, id="plain"), pytest.param(ISOLATED, id="isolated")])
def headers(request: pytest.FixtureRequest) -> dict[str, str]:
    return request.param


@pytest.fixture
def page(folder: Path, tmp_path: Path) -> Iterator[Page]:
    (tmp_path / "downloads").mkdir()
    # Every other host is this machine's closed port: what the page asked for there would fail.
    flags = (*NO_GPU, "--host-resolver-rules=MAP * 127.0.0.1:9, EXCLUDE 127.0.0.1")
    with served(folder) as server, browsing(tmp_path / "profile", flags) as browser:
        page = Page(browser, server, tmp_path / "downloads")
        yield page
        assert browser.complaints() == []
        asked = {each["request"]["url"] for each in browser.told("Network.requestWillBeSent")}
        assert all(each.startswith((server.address, "blob:", "data:")) for each in asked), asked


def expected(predictor: SamPredictor, **prompt: Any) -> np.ndarray:
    """The mask that SamPredictor is asked for: of one click the best of three."""
    given = len(prompt.get("point_labels", ())) + 2 * ("box" in prompt)
    masks, ious, _ = predictor.predict(**prompt, multimask_output=given == 1)
    return masks[ious.argmax()]


def best_object(predictor: SamPredictor, masks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The object that the student knows best, and a click on it."""
    clicks = [np.argwhere(mask)[mask.sum() // 2][::-1] for mask in masks]
    ious = [
        mask_iou(expected(predictor, point_coords=click[None], point_labels=np.ones(1)), mask)
        for click, mask in zip(clicks, masks, strict=True)
    ]
    best = int(np.argmax(ious))
    return masks[best], clicks[best]


@pytest.mark.slow
@needs_browser
def test_clicks_and_boxes_make_the_predictors_masks(
    folder: Path,
    predictor: SamPredictor,
    scene: tuple[np.ndarray, list[np.ndarray]],
    tmp_path: Path,
    headers: dict[str, str],
) -> None:
    """Hover, click, click beside it, undo, redo, box, clear; what is shown and what is saved."""
    image, masks = scene
    predictor.set_image(image)
    truth, click = best_object(predictor, masks)
    beside = np.argwhere(~truth)[7][::-1]
    (tmp_path / "downloads").mkdir()
    with served(folder, headers) as server, browsing(tmp_path / "profile") as browser:
        page = Page(browser, server, tmp_path / "downloads")
        page.load()
        cores = browser.evaluate("navigator.hardwareConcurrency")
        threads = min(cores, 8) if headers else 1
        assert page.text("backend") == ("WASM, 1 thread" if threads == 1 else f"WASM, {threads} threads")
        page.show(image)
        first = expected(predictor, point_coords=click[None], point_labels=np.ones(1))
        browser.hover(*page.place(*(click + 0.5)))
        page.settle()
        preview = page.shown_small()
        assert mask_iou(preview, first) >= 0.95  # the pointer is within the pixel, not at its middle
        browser.click(*page.place(*(click + 0.5)))
        page.settle()
        assert mask_iou(page.shown_small(), first) >= 0.95
        after_one = page.shown()
        browser.click(*page.place(*(beside + 0.5)), modifiers=SHIFT)
        page.settle()
        given = json.loads(page.saved("r", "scene_mask.json"))
        points = np.array(given["points"])
        assert points[:, 2].tolist() == [1, 0]
        np.testing.assert_allclose(points[:, :2], [click + 0.5, beside + 0.5], atol=0.6)
        both = expected(predictor, point_coords=points[:, :2], point_labels=points[:, 2])
        ious = [mask_iou(found, both) for found in (page.shown_small(), page.saved_mask(), decoded(given))]
        browser.press("z")
        page.settle()
        np.testing.assert_array_equal(page.shown(), after_one)
        given = json.loads(page.saved("r", "scene_mask.json"))
        one = expected(predictor, point_coords=np.array(given["points"])[:, :2], point_labels=np.ones(1))
        ious += [mask_iou(found, one) for found in (page.shown_small(), page.saved_mask(), decoded(given))]
        assert mask_iou(page.saved_mask(), truth) >= 0.8
        browser.press("y")
        page.settle()
        assert not np.array_equal(page.shown(), after_one)
        browser.press("c")
        page.settle()
        assert not page.shown().any()
        rows, columns = np.nonzero(truth)
        box = columns.min(), rows.min(), columns.max(), rows.max()
        browser.drag(page.place(*box[:2]), page.place(*box[2:]))
        page.settle()
        given = json.loads(page.saved("r", "scene_mask.json"))
        np.testing.assert_allclose(given["box"], box, atol=1)
        boxed = expected(predictor, box=np.array(given["box"]))
        ious += [mask_iou(found, boxed) for found in (page.shown_small(), page.saved_mask(), decoded(given))]
        print(f"{page.text('backend')}: least IoU {min(ious):.4f} of {len(ious)}")
        assert min(ious) >= 0.98
        assert page.saved_mask().shape == image.shape[:2]
        assert given["area"] == decoded(given).sum()
        assert browser.complaints() == []


def decoded(record: dict[str, Any]) -> np.ndarray:
    return coco.decode(record["segmentation"]) > 0


@pytest.mark.slow
@needs_browser
def test_everything_is_what_segment_anything_finds(
    page: Page, predictor: SamPredictor, scene: tuple[np.ndarray, list[np.ndarray]]
) -> None:
    image, _ = scene
    page.load()
    page.show(image)
    page.browser.press("e")
    page.wait("ready")
    said = page.text("status")
    found = json.loads(page.saved("r", "scene_masks.json"))
    generator = SamAutomaticMaskGenerator(
        predictor.model, points_per_side=8, pred_iou_thresh=0.6, stability_score_thresh=0.7
    )
    wanted = generator.generate(image)
    assert len(found) == len(wanted) > 3
    for each, other in zip(found, wanted, strict=True):
        assert mask_iou(decoded(each), other["segmentation"]) >= 0.98
        assert each["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-3)
        assert each["stability_score"] == pytest.approx(other["stability_score"], abs=0.02)
        np.testing.assert_allclose(each["bbox"], other["bbox"], atol=1)
    assert f"{len(found)} masks in" in said
    page.browser.press("z")
    page.settle()
    assert not page.shown().any()


@pytest.mark.slow
@needs_browser
def test_everything_can_be_stopped(page: Page, scene: tuple[np.ndarray, list[np.ndarray]]) -> None:
    page.load()
    page.show(scene[0])
    page.browser.evaluate("document.getElementById('grid').value = '32'")
    page.browser.press("e")
    page.wait("everything")
    page.browser.evaluate("document.getElementById('cancel').click()")
    page.wait("ready")
    assert page.text("status") == "Everything: stopped."


@pytest.mark.slow
@needs_browser
def test_the_keyboard_alone_is_enough(page: Page, scene: tuple[np.ndarray, list[np.ndarray]]) -> None:
    """The example by Tab and Enter; crosshair, add, remove, box, undo; the help, and out of it."""
    page.load()
    focused = "document.activeElement.dataset.do ?? document.activeElement.id"
    seen = []
    while (now := page.browser.evaluate(focused)) != "example":
        page.browser.press("Tab")
        seen.append(now)
        assert len(seen) < 20, seen
    page.browser.press("Enter")
    until(lambda: page.text("status").startswith("Click on"))
    page.browser.press("p")
    assert page.browser.evaluate("document.activeElement.id") == "marks"
    for key in ("ArrowLeft", "ArrowUp", "ArrowUp"):
        page.browser.press(key)
    page.browser.press("Enter")
    page.settle()
    one = page.shown()
    assert one.any()
    assert "Mask of" in page.text("status")
    for _ in range(6):
        page.browser.press("ArrowRight")
    page.browser.press("Enter", modifiers=SHIFT)
    page.settle()
    assert not np.array_equal(page.shown(), one)
    page.browser.press("z")
    page.settle()
    np.testing.assert_array_equal(page.shown(), one)
    page.browser.press("c")
    page.browser.press("b")
    for _ in range(8):
        page.browser.press("ArrowDown")
        page.browser.press("ArrowLeft")
    page.browser.press("b")
    page.settle()
    path = page.downloads / "example_mask.json"
    page.browser.press("r")
    given = json.loads(until(lambda: path.exists() and path.read_text()))
    assert given["points"] == []
    assert given["box"][0] < given["box"][2]
    page.browser.press("?")
    assert page.browser.evaluate("document.getElementById('keys').open")
    page.browser.press("Escape")
    assert not page.browser.evaluate("document.getElementById('keys').open")


@pytest.mark.slow
@needs_browser
def test_a_phone(page: Page, scene: tuple[np.ndarray, list[np.ndarray]]) -> None:
    """390 px wide: nothing sticks out, a tap adds, a long one removes, and with *Box* a finger draws one."""
    page.browser.resize(390, 844, 2, mobile=True)
    page.load()
    wide = "document.documentElement.scrollWidth"
    assert page.browser.evaluate(wide) == 390
    page.show(scene[0])
    assert page.browser.evaluate(wide) == 390
    small = (
        "[...document.querySelectorAll('button:not([disabled]), fieldset span')].filter((each) => "
        "each.offsetParent && each.getBoundingClientRect().height < 40).length"
    )
    assert page.browser.evaluate(small) == 0
    page.browser.tap(*page.place(60, 50))
    page.settle()
    assert "Mask of" in page.text("status")
    page.browser.tap(*page.place(20, 20), hold=0.8)
    page.settle()
    given = json.loads(page.saved("r", "scene_mask.json"))
    assert [label for *_, label in given["points"]] == [1, 0]


HOSTILE = {
    "no picture": (b"hello", "not a picture"),
    "nothing": (b"", "not a picture"),
    "a text of XML": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "not a picture"),
}


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


@pytest.mark.slow
@needs_browser
def test_what_is_no_picture_is_a_line(page: Page, scene: tuple[np.ndarray, list[np.ndarray]], tmp_path: Path) -> None:
    page.load()
    page.show(scene[0])
    page.browser.click(*page.place(60, 50))
    page.settle()
    before = page.shown()
    too_large = encoded(Image.new("1", (11_000, 10_000)))
    cut_short = encoded(Image.fromarray(scene[0]))[:200]
    hostile = {**HOSTILE, "too large": (too_large, "more than 100 megapixels"), "cut": (cut_short, "not a picture"),
               "elongated": (encoded(Image.new("L", (9000, 3))), "too elongated")}  # fmt: skip
    for name, (content, reason) in hostile.items():
        path = tmp_path / "hostile.png"
        path.write_bytes(content)
        page.browser.evaluate("document.getElementById('fault').hidden = true")
        page.browser.choose("#file", path)
        page.browser.wait_for("!document.getElementById('fault').hidden")
        assert reason in page.text("fault"), name
        page.wait("ready")
        np.testing.assert_array_equal(page.shown(), before)
    page.show(scene[0])  # and it goes on
    assert page.browser.evaluate("document.getElementById('fault').hidden")


@pytest.mark.slow
@needs_browser
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_of_any_kind(page: Page, predictor: SamPredictor, tmp_path: Path) -> None:
    """Turned by EXIF, of a palette, grey, with alpha, and of 99 megapixels: masks as the predictor's of the picture as
    Pillow sees it."""
    image, _ = generate_scene(np.random.default_rng(1), 300)
    whole = Image.fromarray(image)
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        "jpeg": encoded(whole, "JPEG", quality=95, exif=turned),
        "palette": encoded(whole.convert("P")),
        "grey": encoded(whole.convert("L")),
        "alpha": encoded(whole.convert("RGBA")),
        "huge": encoded(whole.resize((11_000, 9_000), Image.Resampling.NEAREST)),
    }
    page.load()
    for name, content in kinds.items():
        path = tmp_path / "scene.png"
        path.write_bytes(content)
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        page.show(path)
        assert page.text("size") == f"{picture.width} × {picture.height}", name
        predictor.set_image(np.asarray(picture))
        x, y = 0.4 * picture.width, 0.5 * picture.height
        page.browser.click(*page.place(x, y))
        page.settle()
        given = json.loads(page.saved("r", "scene_mask.json"))
        mask = expected(predictor, point_coords=np.array(given["points"])[:, :2], point_labels=np.ones(1))
        assert mask_iou(decoded(given), mask) >= (0.95 if name == "jpeg" else 0.98), name
        if name == "huge":
            assert page.saved_mask().shape == (9_000, 11_000)


@pytest.mark.slow
@needs_browser
def test_the_worker_keeps_to_the_policy(page: Page, folder: Path) -> None:
    """Whatever a script beside the page's own would ask of another host."""
    page.load()
    probe = folder / "probe.mjs"
    probe.write_text(
        "addEventListener('securitypolicyviolation', (event) => postMessage(event.blockedURI));"
        "fetch('http://127.0.0.1:9/').then(() => postMessage('it got out'), () => 0);"
    )
    script = """(async () => {
      const { Engine } = await import("./engine.mjs");
      let source;
      const begin = URL.createObjectURL;
      URL.createObjectURL = (blob) => ((source = blob), begin(blob));
      new Engine(() => {}).worker.terminate();
      URL.createObjectURL = begin;
      const other = (await source.text()).replace("worker.mjs", "probe.mjs");
      const worker = new Worker(begin(new Blob([other], { type: "text/javascript" })), { type: "module" });
      return new Promise((resolve) => (worker.onmessage = ({ data }) => resolve(data)));
    })()"""
    try:
        assert page.browser.evaluate(script).startswith("http://127.0.0.1:9")
    finally:
        probe.unlink()
    page.browser.events.clear()  # what was provoked


@pytest.mark.slow
@needs_browser
def test_what_the_server_does_not_have_is_a_line(folder: Path, tmp_path: Path) -> None:
    for missing, said in (("decoder_batch.onnx", "decoder_batch.onnx is not on the server (404)"),
                          ("model.json", "model.json is not on the server (404)")):  # fmt: skip
        partial = tmp_path / missing
        partial.mkdir()
        for file in folder.iterdir():
            if file.name != missing:
                (partial / file.name).symlink_to(file)
        with served(partial) as server, browsing(tmp_path / f"profile-{missing}") as browser:
            browser.open(server.address)
            browser.wait_for("document.body.dataset.state === 'failed'")
            assert said in browser.evaluate("document.getElementById('fault').textContent")


@pytest.mark.slow
@needs_browser
def test_as_a_file_it_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    with browsing(tmp_path / "profile") as browser:
        browser.open((folder / "index.html").as_uri())
        time.sleep(5)
        visible = "getComputedStyle(document.getElementById('unserved')).visibility"
        assert browser.evaluate(visible) == "visible"
        assert "python -m http.server" in browser.evaluate("document.getElementById('unserved').textContent")


@pytest.mark.slow
@needs_browser
def test_webgpu_makes_the_same_masks(
    folder: Path, predictor: SamPredictor, scene: tuple[np.ndarray, list[np.ndarray]], tmp_path: Path
) -> None:
    """On SwiftShader, which computes in float32 alone."""
    image, masks = scene
    predictor.set_image(image)
    _, click = best_object(predictor, masks)
    (tmp_path / "downloads").mkdir()
    with served(folder) as server, browsing(tmp_path / "profile", SOFTWARE_WEBGPU) as browser:
        browser.open(server.address)
        script = "(async () => Boolean(await navigator.gpu?.requestAdapter()))()"
        if not browser.evaluate(script):
            pytest.skip("this Chromium has no SwiftShader for WebGPU")
        page = Page(browser, server, tmp_path / "downloads")
        page.load("?backend=webgpu")
        assert page.text("backend") == "WebGPU, float32"
        page.show(image)
        browser.click(*page.place(*(click + 0.5)))
        page.settle()
        given = json.loads(page.saved("r", "scene_mask.json"))
        one = expected(predictor, point_coords=np.array(given["points"])[:, :2], point_labels=np.ones(1))
        assert mask_iou(decoded(given), one) >= 0.98
        assert browser.complaints() == []
