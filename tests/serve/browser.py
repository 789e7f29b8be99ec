"""Headless Chromium over the pipe of its DevTools protocol: no driver and no further package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SECONDS = 60.0
_KEYS = {"Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""), "/": ("Slash", 191, "/")}


class Page:
    """A page of the browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol; returns its result."""
        return self._browser.send(method, self._session, **parameters)

    @property
    def events(self) -> list[Any]:
        """What happened in the page until now."""
        self.send("Runtime.evaluate", expression="0")
        return [event for event in self._browser.events if event.get("sessionId") == self._session]

    @property
    def failures(self) -> list[str]:
        """Uncaught errors of scripts, and what the policy of the page refused."""
        failures = []
        for event in self.events:
            if event["method"] == "Runtime.exceptionThrown":
                failures.append(str(event["params"]["exceptionDetails"]))
            entry = event["params"].get("entry", {})
            if event["method"] == "Log.entryAdded" and entry["source"] in ("security", "violation"):
                failures.append(entry["text"])
        return failures

    @property
    def requests(self) -> list[str]:
        """URLs that the page asked for."""
        events = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in events]

    def open(self, url: str, width: int = 1280, height: int = 800, scheme: str = "light") -> None:
        """Go to a URL, in a window of this size and colour scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=media)
        self.send("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Evaluate an expression, or a promise of one."""
        answer = self.send(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        """Wait until an expression is true; returns its value."""
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end:
            if value := self.run(
                f"(() => {{ try {{ return {script} }} catch {{ return null }} }})()"
            ):
                return value
            time.sleep(0.02)
        raise AssertionError(f"{script} stays false: {self.run('document.body.innerText')[:500]}")

    def press(self, *keys: str) -> None:
        """Press keys one after another."""
        for key in keys:
            code, number, text = _KEYS.get(key, (key, 0, ""))
            fields = {"key": key, "code": code, "windowsVirtualKeyCode": number}
            self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **fields)
            self.send("Input.dispatchKeyEvent", type="keyUp", **fields)

    def write(self, text: str) -> None:
        """Type a text where the focus is."""
        self.send("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the window."""
        data = self.send("Page.captureScreenshot")["data"]
        path.write_bytes(base64.b64decode(data))


class Browser:
    """A process of Chromium."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = os.fdopen(reader, "rb", 0), os.fdopen(writer, "wb", 0)
        self._buffer, self._calls = b"", 0
        self.events: list[Any] = []

    def send(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """Call a method of the protocol; returns its result."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self._writer.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                chunk = self._reader.read(1 << 16)
                assert chunk, "the browser has ended"
                self._buffer += chunk
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") != self._calls:
                self.events.append(answer)
                continue
            assert "error" not in answer, (method, answer["error"])
            return answer["result"]

    def page(self) -> Page:
        """Open an empty page with storage of its own."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)
        answer = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        return Page(self, answer["sessionId"])


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Start Chromium with its profile in a folder; skips the test where there is none."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None or os.name != "posix":
        pytest.skip("needs Chromium")
    command = [
        program,
        "--headless",
        "--remote-debugging-pipe",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={folder}",
    ]
    commands, from_us = os.pipe()
    to_us, answers = os.pipe()
    # The browser reads from descriptor 3 and writes to 4.
    shell = f'exec 3<&{commands} 4>&{answers}; exec "$@"'
    with subprocess.Popen(
        ["bash", "-c", shell, "bash", *command],
        pass_fds=(commands, answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(commands)
        os.close(answers)
        try:
            yield Browser(to_us, from_us)
        finally:
            process.kill()
