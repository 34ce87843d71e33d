"""The pictures of docs/browser.md: `python tests/helpers/screenshots.py RUN/export/web docs`."""

import argparse
import tempfile
import time
from pathlib import Path

from PIL import Image

from browser import ISOLATED, SHIFT, Browser, browsing, served


def place(browser: Browser, x: float, y: float) -> tuple[float, float]:
    """Where a point of the picture, in shares of its width and height, is in the window."""
    left, top, width, height = browser.evaluate(
        "(({ left, top, width, height }) => [left, top, width, height])"
        "(document.getElementById('marks').getBoundingClientRect())"
    )
    return left + x * width, top + y * height


def settle(browser: Browser) -> None:
    browser.wait_for("document.body.dataset.state === 'ready'")
    browser.wait_for("document.getElementById('marks').ariaBusy === 'false'")
    time.sleep(0.3)  # what is drawn meanwhile


def show_example(browser: Browser, address: str) -> None:
    browser.open(address)
    browser.wait_for("document.body.dataset.state === 'empty'")
    browser.press("x")
    browser.wait_for("document.getElementById('status').textContent.startsWith('Click on')")
    settle(browser)


def keep(browser: Browser, path: Path) -> None:
    """A screenshot as JPEG: a scene has too much grain for anything else."""
    with tempfile.TemporaryDirectory() as folder:
        browser.screenshot(Path(folder, "shot.png"))
        Image.open(Path(folder, "shot.png")).convert("RGB").save(path, quality=88)


def main() -> None:
    """A mask of two clicks on a wide window; everything, on a phone in the dark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="RUN/export/web")
    parser.add_argument("out", type=Path, help="where the pictures go")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as profile,
        served(given.page, ISOLATED) as server,
        browsing(Path(profile, "profile")) as browser,
    ):
        browser.resize(1280, 800)
        show_example(browser, server.address)
        browser.click(*place(browser, 0.55, 0.35))
        settle(browser)
        browser.click(*place(browser, 0.3, 0.7), modifiers=SHIFT)
        settle(browser)
        keep(browser, given.out / "browser.jpg")
        browser.resize(390, 844, 2, mobile=True, dark=True)
        show_example(browser, server.address)
        browser.press("e")
        settle(browser)
        keep(browser, given.out / "browser_phone.jpg")


if __name__ == "__main__":
    main()
