"""Owns a headless Chromium, driven over the WebDriver protocol, which is JSON over HTTP."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
ENTER = "\ue007"

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element, fixed by the standard


class Browser:
    """A session of a browser; use it with `with`."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        assert DRIVER is not None
        self.driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        self.session = ""
        try:
            assert self.driver.stdout is not None
            for line in self.driver.stdout:
                if found := re.search(r"started successfully on port (\d+)", line):
                    self.address = f"http://127.0.0.1:{found[1]}"
                    break
            flags = ["--headless=new", "--disable-gpu", f"--user-data-dir={profile}"]
            if os.geteuid() == 0:
                flags.append("--no-sandbox")
            options = {
                "browserName": "chrome",
                "goog:chromeOptions": {"binary": CHROMIUM, "args": flags},
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": options}})
            self.session = f"/session/{made['sessionId']}"
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._stop()

    def _stop(self) -> None:
        self.driver.terminate()
        self.driver.communicate(timeout=20)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.address}{self.session}{path}",
            data,
            {"Content-Type": "application/json", "Connection": "close"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, file: Path) -> None:
        """Show a file, and forget what was logged before."""
        self._call("POST", "/url", {"url": "about:blank"})
        self.log("browser")
        self.log("performance")
        self._call("POST", "/url", {"url": file.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """What a script returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def find(self, css: str) -> str:
        """The first element that a selector matches."""
        found = self._call("POST", "/element", {"using": "css selector", "value": css})
        return str(found[_ELEMENT])

    def click(self, css: str) -> None:
        """Click on the middle of an element."""
        self._call("POST", f"/element/{self.find(css)}/click", {})

    def press(self, css: str, keys: str) -> None:
        """Focus an element and press keys."""
        self._call("POST", f"/element/{self.find(css)}/value", {"text": keys})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call: of the `browser`, or of `performance`."""
        found: list[dict[str, Any]] = self._call("POST", "/se/log", {"type": kind})
        return found

    def requests(self) -> list[str]:
        """Addresses of everything that the page asked for, itself included."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def devtools(self, command: str, **params: Any) -> Any:
        """Call the DevTools protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def look(self, *, width: int = 1200, dark: bool = False, media: str = "screen") -> None:
        """Become a screen of that width, light or dark; up to 600 pixels it is a phone's."""
        phone = width <= 600
        screen = {"width": width, "height": 800, "deviceScaleFactor": 2 if phone else 1}
        self.devtools("Emulation.setDeviceMetricsOverride", mobile=phone, **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def screenshot(self, file: Path) -> None:
        """Write the whole page, not only what fits the screen, as PNG."""
        made = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(made["data"]))
