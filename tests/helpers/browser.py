"""Headless Chromium, driven through its DevTools protocol over a pipe: nothing beside the browser is needed.

Methods and events are those of https://chromedevtools.github.io/devtools-protocol/.
"""

import base64
import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from support import CHROMIUM

FLAGS = (
    "--headless", "--no-sandbox", "--disable-background-networking", "--no-first-run", "--hide-scrollbars",
    "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip

NO_GPU = ("--disable-gpu",)

SOFTWARE_WEBGPU = (
    "--enable-unsafe-webgpu", "--enable-features=Vulkan", "--use-webgpu-adapter=swiftshader",
)  # fmt: skip
"""WebGPU on the processor, by the SwiftShader that Chromium brings."""

ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
"""What a server sends so that a page may use threads."""

KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, " ": 32}
"""Key codes of those that are not a letter; a letter's is that of its capital."""

ALT, CONTROL, SHIFT = 1, 2, 8


class BrowserError(RuntimeError):
    """A method was refused, or a script of the page threw."""


class Browser:
    """A Chromium with one page, at `about:blank`.

    Args:
        profile: an empty folder of its own.
        flags: further ones.
        size: width and height of the window in CSS pixels.
    """

    def __init__(self, profile: Path, flags: tuple[str, ...] = NO_GPU, size: tuple[int, int] = (1280, 800)) -> None:
        assert CHROMIUM is not None
        read_commands, self._write = os.pipe()
        self._read, write_answers = os.pipe()
        # The pipe's ends are 3 and 4 to the browser, whatever their numbers are here.
        shell = ["/bin/bash", "-c", f'exec "$@" 3<&{read_commands} 4>&{write_answers}', "browser"]
        self.process = subprocess.Popen(
            [
                *shell,
                CHROMIUM,
                *FLAGS,
                *flags,
                f"--user-data-dir={profile}",
                f"--window-size={size[0]},{size[1]}",
                "about:blank",
            ],
            pass_fds=(read_commands, write_answers),
            preexec_fn=_on_all_cores,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self.events: list[dict[str, Any]] = []
        """All that the page has told, in order."""
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._number = 0
        self._session: str | None = None
        threading.Thread(target=self._listen, daemon=True).start()
        (page,) = (each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        with suppress(BrowserError, OSError, queue.Empty):
            self._session = None
            self.call("Browser.close", wait=5)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._write)

    def call(self, method: str, wait: float = 120, **parameters: Any) -> dict[str, Any]:
        """What a method answers; raises `BrowserError` where it is refused."""
        self._number += 1
        number = self._number
        answered = self._answers[number] = queue.Queue()
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = answered.get(timeout=wait)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        return answer["result"]

    def _listen(self) -> None:
        held = b""
        while block := os.read(self._read, 1 << 20):
            *whole, held = (held + block).split(b"\0")
            for message in map(json.loads, whole):
                if "id" in message:
                    self._answers.pop(message["id"]).put(message)
                else:
                    self.events.append(message)
        os.close(self._read)

    def told(self, method: str) -> list[dict[str, Any]]:
        """What was said with an event, each time."""
        return [event["params"] for event in list(self.events) if event["method"] == method]

    def open(self, address: str) -> None:
        """Go to an address, and wait for the page to load."""
        before = len(self.told("Page.loadEventFired"))
        self.call("Page.navigate", url=address)
        until(lambda: len(self.told("Page.loadEventFired")) > before)

    def evaluate(self, script: str, wait: float = 120) -> Any:
        """What an expression of the page comes to; a promise is awaited."""
        found = self.call(
            "Runtime.evaluate", wait, expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description", details["text"]))
        return found["result"].get("value")

    def wait_for(self, script: str, wait: float = 120) -> Any:
        """The value of an expression as soon as it is true."""
        return until(lambda: self.evaluate(script), wait, script)

    def mouse(self, kind: str, x: float, y: float, modifiers: int = 0, button: str = "left") -> None:
        """`pressed`, `released` or `moved`, at CSS pixels of the window."""
        held = {"buttons": 1 if kind != "released" else 0} if button == "left" else {}
        if kind == "moved" and button == "none":
            held = {"buttons": 0}
        self.call(
            "Input.dispatchMouseEvent",
            type=f"mouse{kind.capitalize()}", x=x, y=y, modifiers=modifiers, button=button, clickCount=1, **held,
        )  # fmt: skip

    def hover(self, x: float, y: float) -> None:
        self.mouse("moved", x, y, button="none")

    def click(self, x: float, y: float, modifiers: int = 0, button: str = "left") -> None:
        self.hover(x, y)
        self.mouse("pressed", x, y, modifiers, button)
        self.mouse("released", x, y, modifiers, button)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press, move in steps, and let go."""
        self.hover(*start)
        self.mouse("pressed", *start)
        for step in range(1, 6):
            self.mouse("moved", *(a + (b - a) * step / 5 for a, b in zip(start, end, strict=True)))
        self.mouse("released", *end)

    def tap(self, x: float, y: float, hold: float = 0) -> None:
        """Touch with a finger, for so many seconds."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        time.sleep(hold)
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key, by what JavaScript calls it."""
        code = KEYS.get(key, ord(key.upper()) if len(key) == 1 else 0)
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        pressed = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **pressed, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def resize(self, width: int, height: int, scale: float = 1, mobile: bool = False, dark: bool = False) -> None:
        """Have a screen of so many CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=mobile)
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def choose(self, selector: str, *files: Path) -> None:
        """Give files to an `<input type=file>`."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def downloads_to(self, folder: Path) -> None:
        """Keep what is downloaded in a folder."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def screenshot(self, path: Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """What went wrong on the page: exceptions that nobody caught, and errors on its console."""
        thrown = [str(each["exceptionDetails"]) for each in self.told("Runtime.exceptionThrown")]
        logged = [each["entry"] for each in self.told("Log.entryAdded")]
        said = [str(each["args"]) for each in self.told("Runtime.consoleAPICalled") if each["type"] == "error"]
        return thrown + [str(entry) for entry in logged if entry["level"] == "error"] + said


def until(condition: Callable[[], Any], wait: float = 120, what: str = "") -> Any:
    """The value of a condition as soon as it is true; raises `TimeoutError`."""
    end = time.monotonic() + wait
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {wait:.0f} s: {what or condition}")
        time.sleep(0.02)
    return value


class Pages(SimpleHTTPRequestHandler):
    """Hands out a folder as any static server does, and notes what was asked for."""

    protocol_version = "HTTP/1.1"

    def end_headers(self) -> None:
        for name, value in self.server.headers.items():  # type: ignore[attr-defined]
            self.send_header(name, value)
        super().end_headers()

    def do_GET(self) -> None:
        self.server.asked.append(urlsplit(self.path).path)  # type: ignore[attr-defined]
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class StaticServer(ThreadingHTTPServer):
    """Hands out a folder; `headers` go with every answer, `asked` are the paths that were asked for."""

    daemon_threads = True

    def __init__(self, folder: Path, headers: dict[str, str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), partial(Pages, directory=str(folder)))
        self.headers = headers or {}
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}/"


@contextmanager
def served(folder: Path, headers: dict[str, str] | None = None) -> Iterator[StaticServer]:
    """A folder on a free port of this machine."""
    with StaticServer(folder, headers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@contextmanager
def browsing(profile: Path, flags: tuple[str, ...] = NO_GPU, size: tuple[int, int] = (1280, 800)) -> Iterator[Browser]:
    """A browser for as long as it is wanted."""
    browser = Browser(profile, flags, size)
    try:
        yield browser
    finally:
        browser.close()


def _on_all_cores() -> None:
    """Tests that run side by side have a core each, of which a browser would start no threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
