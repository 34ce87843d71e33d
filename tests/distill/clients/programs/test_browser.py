"""`segment.html` in headless Chromium: what it makes of a picture's file is what `SamPredictor` makes of the pixels
that Python reads from it."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segment_anything import SamPredictor

from browser import NO_GPU, SHIFT, Browser, StaticServer, browsing, served, until
from distill.evaluate.ious import mask_iou
from embeddings_cache.images.decoding import decode_image
from npm import needs_node
from programs import CLICKS, PROMPTS, Point, Prompt, expect, expect_all, kinds, lay_programs, pictures
from support import CHROMIUM

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


class Page:
    """The page in a browser: its picture, and what it says and saves."""

    def __init__(self, browser: Browser, server: StaticServer, downloads: Path) -> None:
        self.browser, self.server, self.downloads = browser, server, downloads
        downloads.mkdir()
        browser.downloads_to(downloads)

    def load(self, query: str = "") -> None:
        self.browser.open(f"{self.server.address}segment.html{query}")
        until(lambda: self.status() == "Choose a picture.")

    def status(self) -> str:
        return self.browser.evaluate("document.getElementById('status').textContent")

    def show(self, photo: Path) -> None:
        self.browser.choose("#file", photo)
        until(lambda: "encoded in" in self.status())

    def open(self, folder: Path, name: str) -> Path:
        """The page anew, with one of the pictures; its file."""
        photo = folder / name
        photo.write_bytes(pictures()[name])
        self.load()
        self.show(photo)
        return photo

    def sized(self) -> tuple[int, int]:
        """Width and height of the picture, as the page says."""
        width, height = re.findall(r"\d+", self.status())[:2]
        return int(width), int(height)

    def press(self, button: str) -> None:
        self.browser.evaluate(f"document.getElementById('{button}').click()")

    def answered(self) -> None:
        until(lambda: re.match(r"Predicted IoU .* ms", self.status()))

    def ask(self, prompt: Prompt, size: tuple[int, int]) -> tuple[list[Point], list[float] | None]:
        """Clear, drag the box, and click one point after the other, with the mouse; what that is in pixels of the
        picture."""
        left, top, wide, high = self.browser.evaluate(
            "(({ left, top, width, height }) => [left, top, width, height])"
            "(document.getElementById('canvas').getBoundingClientRect())"
        )

        def window(x: float, y: float) -> tuple[int, int]:
            return round(left + x * wide), round(top + y * high)

        def inside(x: float, y: float) -> tuple[float, float]:
            return (x - left) / wide * size[0], (y - top) / high * size[1]

        def wait() -> None:
            self.answered()
            self.browser.evaluate("document.getElementById('status').textContent = 'asked'")

        if not self.browser.evaluate("document.getElementById('clear').disabled"):
            self.press("clear")
            until(lambda: self.status() == "Click on the object.")
        box = None
        if prompt.box:
            start, end = window(*prompt.box[:2]), window(*prompt.box[2:])
            self.browser.drag(start, end)
            wait()
            box = [*inside(*start), *inside(*end)]
        points = []
        for number, (x, y, label) in enumerate(prompt.points):
            at = window(x, y)
            by_button = {"button": "right"} if number % 2 else {"modifiers": SHIFT}
            self.browser.click(*at, **({} if label else by_button))
            wait()
            points.append((*inside(*at), label))
        return points, box

    def shown(self) -> np.ndarray:
        """What the canvas shows, RGB."""
        url = self.browser.evaluate("document.getElementById('canvas').toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))

    def saved(self, photo: Path) -> np.ndarray:
        """The mask that *Save mask* downloads, boolean."""
        path = self.downloads / f"{photo.stem}_mask.png"
        path.unlink(missing_ok=True)
        self.press("save")
        until(lambda: self.status().startswith("Saved"))
        png = Image.open(io.BytesIO(until(lambda: path.exists() and path.read_bytes())))
        assert png.mode == "L"
        mask = np.asarray(png)
        assert set(np.unique(mask)) <= {0, 255}
        return mask > 0


@pytest.fixture
def page(folder: Path, tmp_path: Path) -> Iterator[Page]:
    # High enough for a strip of 977 pixels.
    with served(folder) as server, browsing(tmp_path / "profile", size=(1280, 1200)) as browser:
        yield Page(browser, server, tmp_path / "downloads")
        assert browser.complaints() == []
        asked = {each["request"]["url"] for each in browser.told("Network.requestWillBeSent")}
        assert all(each.startswith((server.address, "blob:", "data:")) for each in asked), asked


@pytest.mark.slow
@needs_node
@needs_browser
def test_the_browser_reads_the_pixels_that_python_reads(page: Page, folder: Path) -> None:
    """Colours under transparency, too, which no canvas keeps."""
    page.load()
    script = """(async () => {
      const { readPixels } = await import("./pixels_web.mjs");
      const { width, height, data, exact } = await readPixels(await (await fetch("NAME")).blob());
      const blob = new Blob([data]);
      const url = await new Promise((done) => {
        const reader = Object.assign(new FileReader(), { onload: () => done(reader.result) });
        reader.readAsDataURL(blob);
      });
      return [height, width, exact, url.split(",")[1]];
    })()"""
    for name, content in kinds().items():
        (folder / "kind").write_bytes(content)
        height, width, exact, data = page.browser.evaluate(script.replace("NAME", f"kind?{name}"))
        expected = decode_image(content)
        found = np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)
        assert exact
        assert (found[..., 3] == 255).all()
        np.testing.assert_array_equal(found[..., :3], expected, name)


@pytest.mark.slow
@needs_node
@needs_browser
def test_without_webgl_the_page_says_what_it_cannot_see(folder: Path, tmp_path: Path) -> None:
    photo = tmp_path / "alpha.png"
    photo.write_bytes(pictures()[photo.name])
    flags = (*NO_GPU, "--disable-software-rasterizer")
    with served(folder) as server, browsing(tmp_path / "profile", flags) as browser:
        page = Page(browser, server, tmp_path / "downloads")
        page.load()
        page.show(photo)
        assert "Without WebGL" in page.status()
        page.ask(PROMPTS["click"], (160, 128))
        assert page.saved(photo).any()
        opaque = tmp_path / "portrait.png"
        opaque.write_bytes(pictures()[opaque.name])
        page.show(opaque)
        assert "WebGL" not in page.status()


@pytest.mark.slow
@needs_node
@needs_browser
def test_the_page_makes_the_predictors_masks(page: Page, predictor: SamPredictor, tmp_path: Path) -> None:
    page.load()
    worst = 1.0
    for name, content in pictures().items():
        photo = tmp_path / name
        photo.write_bytes(content)
        image = decode_image(content)
        page.show(photo)
        size = page.sized()
        assert size == (image.shape[1], image.shape[0]), name
        predictor.set_image(image)
        shares = []
        for kind, prompt in PROMPTS.items():
            points, box = page.ask(prompt, size)
            if box and points:  # the box first, and each click corrects
                earlier = expect(predictor, [], box)
                for count in range(1, len(points) + 1):
                    earlier = expect(predictor, points[:count], box, earlier.low_res)
                expected = earlier
            else:
                expected = expect_all(predictor, points, box, refine=True) if points else expect(predictor, [], box)
            mask = page.saved(photo)
            iou = mask_iou(mask, expected.mask)
            assert iou >= 0.99, (name, kind)
            worst = min(worst, iou)
            shares.append(expected.mask.mean())
        assert sum(0.01 < share < 0.99 for share in shares) >= 3, (name, shares)
    print(f"worst IoU in the browser: {worst:.4f}")


@pytest.mark.slow
@needs_node
@needs_browser
def test_clicks_are_shown_and_taken_back(page: Page, tmp_path: Path) -> None:
    """By mouse, and by keys alone; in a dark window of a telephone's width too."""
    photo = page.open(tmp_path, "landscape.jpg")
    size, bare = page.sized(), page.shown()
    page.ask(Prompt(CLICKS[:1]), size)
    one = page.shown()
    changed = (one != bare).any(axis=2)
    assert 0.01 < changed.mean() < 0.99
    page.browser.click(40, 40)  # outside of the picture
    np.testing.assert_array_equal(page.shown(), one)
    page.browser.evaluate("document.getElementById('canvas').focus()")
    for key in ("ArrowLeft", "ArrowUp", "ArrowUp"):
        page.browser.press(key)
    page.browser.press("Enter", modifiers=SHIFT)
    page.answered()
    assert (page.shown() != one).any()
    page.press("undo")
    until(lambda: "ms" not in page.status())
    page.browser.click(40, 40)
    page.press("clear")
    until(lambda: page.status() == "Click on the object.")
    assert page.browser.evaluate("document.getElementById('save').disabled")

    words = tmp_path / "words.png"
    words.write_text("hello")
    page.browser.choose("#file", words)
    until(lambda: page.status() == "That is not a picture that this browser can read.")
    page.browser.resize(390, 844, 2, mobile=True, dark=True)
    page.load()
    page.show(photo)
    assert page.browser.evaluate("document.documentElement.scrollWidth") == 390
    assert page.browser.evaluate("document.getElementById('canvas').width") > 390  # the screen's own pixels


@pytest.mark.slow
@needs_node
@needs_browser
def test_a_click_on_a_picture_is_none_on_the_next(page: Page, tmp_path: Path) -> None:
    """Made while that one is being read, and the one before is still shown."""
    page.open(tmp_path, "landscape.jpg")
    page.browser.evaluate("""
      document.getElementById("status").textContent = "";
      document.getElementById("file").dispatchEvent(new Event("change"));  // the same file; in the same breath a click
      document.getElementById("canvas").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
    """)
    until(lambda: "encoded in" in page.status())
    page.browser.evaluate("document.getElementById('canvas').focus()")
    page.browser.press("Enter")
    page.answered()
    page.press("undo")
    until(lambda: "ms" not in page.status())
    assert page.status() == "Click on the object."  # there was one click, and not two


@pytest.mark.slow
@needs_node
@needs_browser
def test_the_page_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    with served(folder) as server, browsing(tmp_path / "profile") as browser:
        page = Page(browser, server, tmp_path / "downloads")
        browser.open(f"{server.address}segment.html?encoder=gone.onnx")
        until(lambda: "gone.onnx" in page.status())
        assert "\n" not in page.status()
        browser.open(f"{server.address}segment.html?encoder=http://127.0.0.1:9/encoder.onnx")
        until(lambda: page.status() != "Loading …")
        assert server.asked.count("/encoder.onnx") == 0
    bare = lay_programs(tmp_path / "bare")
    with served(bare) as server, browsing(tmp_path / "other") as browser:
        page = Page(browser, server, tmp_path / "more")
        browser.open(f"{server.address}segment.html")
        until(lambda: "npm install brings onnxruntime-web" in page.status())
        browser.events.clear()
        browser.open((bare / "segment.html").as_uri())
        until(lambda: "npx http-server" in page.status())
        assert browser.complaints() == []
