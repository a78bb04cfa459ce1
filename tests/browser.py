"""A headless Chromium for tests, driven through chromedriver's HTTP interface (W3C WebDriver): no package needed."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The name the standard gives an element's reference."""


def missing() -> str:
    """Why there is no browser here; empty when there is one."""
    if _chromium() is None:
        return "no Chromium is installed"
    return "" if shutil.which("chromedriver") else "no chromedriver is installed"


class Browser:
    """One window."""

    def __init__(self, address: str) -> None:
        self.address = address

    def open(self, url: str) -> None:
        self._call("url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a JavaScript function returns."""
        return self._call("execute/sync", {"script": script, "args": list(arguments)})

    def click(self, css: str) -> None:
        """With the mouse, as a user: it fails where something else lies over the element."""
        self._call(f"element/{self._element(css)}/click", {})

    def resize(self, width: int, height: int) -> None:
        """The size of the page's part of the window in pixels, whatever the frame takes."""
        outer = self.run("return [outerWidth - innerWidth, outerHeight - innerHeight]")
        self._call("window/rect", {"width": width + outer[0], "height": height + outer[1]})

    def screenshot(self, path: Path) -> None:
        with urlopen(f"{self.address}/screenshot") as answer:
            path.write_bytes(base64.b64decode(json.load(answer)["value"]))

    def _element(self, css: str) -> str:
        return self._call("element", {"using": "css selector", "value": css})[ELEMENT]

    def _call(self, command: str, data: dict[str, Any]) -> Any:
        return post(f"{self.address}/{command}", data)


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    """A browser with a fresh profile; it is gone afterwards, and so are its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    root = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as profile:
        try:
            options = {"binary": _chromium(), "args": [*QUIET, f"--user-data-dir={profile}"]}
            wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            _wait(f"{root}/status")
            session = f"{root}/session/{post(f'{root}/session', wanted)['sessionId']}"
            try:
                yield Browser(session)
            finally:
                urlopen(Request(session, method="DELETE")).close()
        finally:
            driver.terminate()
            driver.wait()


def post(url: str, data: dict[str, Any]) -> Any:
    """The `value` of the answer. Raises: HTTPError."""
    with urlopen(Request(url, json.dumps(data).encode(), {"Content-Type": "application/json"}), timeout=120) as answer:
        return json.load(answer)["value"]


def _wait(url: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(URLError, ConnectionError), urlopen(url) as answer:
            if json.load(answer)["value"]["ready"]:
                return
        if time.monotonic() > end:
            raise TimeoutError(f"chromedriver does not answer at {url}")
        time.sleep(0.1)


def _chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)
