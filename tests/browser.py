"""A headless Chromium, driven over a pipe by its DevTools protocol. Tests that need one are skipped where there is
none."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from rlhf.types import Json

NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_S = 60.0
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-pipe",
)

Event = Mapping[str, Json]


def find_browser() -> str | None:
    """The program of a Chromium; None where none is installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One Chromium with one page."""

    def __init__(self, program: str, profile: Path) -> None:
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        script = f'exec "$@" 3<&{commands} 4>&{answers}'
        words = ["bash", "-c", script, "browser", program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            words, pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(answers)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[Event] = []
        (target,) = [one for one in self._targets() if one["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = str(attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        os.close(self._out)
        os.close(self._in)

    def call(self, method: str, **parameters: Json) -> dict[str, Json]:
        """Send a command, and wait for its result. Events that come meanwhile are kept."""
        self._number += 1
        number = self._number
        message: dict[str, Json] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read(TIMEOUT_S)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result = answer["result"]
                assert isinstance(result, dict)
                return result

    def open(self, page: Path, wait_for: str = "document.querySelector('#main section') !== null") -> None:
        """Open a file in a page that forgets the one before, and wait until `wait_for` is true there."""
        self.call("Page.navigate", url="about:blank")
        self.call("Network.clearBrowserCache")
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        self.wait(wait_for)

    def js(self, expression: str) -> Json:
        """The value of an expression, which may be a promise. An exception in it fails the test."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        result = found["result"]
        assert isinstance(result, dict)
        return result.get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript condition holds."""
        end = time.monotonic() + TIMEOUT_S
        while not self.js(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never became true: {condition}"
            time.sleep(0.05)

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Give the page a size and a color scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme: Json = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def screenshot(self, path: Path) -> None:
        """Save what the page shows as PNG."""
        shot = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(str(shot["data"])))

    @property
    def complaints(self) -> list[str]:
        """Everything that reached the console or was not caught."""
        return [json.dumps(event) for event in self.events if event["method"] in COMPLAINTS]

    @property
    def requests(self) -> list[str]:
        """The address of everything that was asked for since `open`, the page's own file included."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [
            str(one["request"]["url"]) for one in sent if isinstance(one, dict) and isinstance(one["request"], dict)
        ]

    def _targets(self) -> list[dict[str, Json]]:
        found = self.call("Target.getTargets")["targetInfos"]
        assert isinstance(found, list)
        return [one for one in found if isinstance(one, dict)]

    def _read(self, timeout_s: float) -> dict[str, Json]:
        end = time.monotonic() + timeout_s
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        assert isinstance(message, dict)
        if "method" in message:
            self.events.append(message)
        return message


COMPLAINTS = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """A browser; skips the test where none is installed."""
    program = find_browser()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with Browser(program, profile) as browser:
        yield browser
