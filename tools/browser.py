"""A headless Chromium, driven through its debugging pipe: just enough to look at a page as a person does.

No driver and no WebSocket is needed: Chromium reads commands from one pipe and writes answers to another, as JSON with
a zero byte behind each (`--remote-debugging-pipe`).
"""

import base64
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VARIABLE = "NITSUM_CHROMIUM"
"""Names the browser where it is not on the path."""

_FLAGS = (
    "--headless",
    "--no-sandbox",  # the pages are our own, and containers have no user namespaces to make a sandbox of
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# Puts the pipes where Chromium looks for them, 3 and 4, by way of numbers that neither of them can have.
_START = """
import os, sys
a, b = (os.dup2(int(fd), 100 + i) for i, fd in enumerate(sys.argv[1:3]))
os.dup2(a, 3); os.dup2(b, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """The browser's path; None if there is none."""
    named = os.environ.get(VARIABLE)
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser with one page; a context manager."""

    def __init__(self, executable: str, timeout_s: float = 60.0) -> None:
        """Starts nothing yet.

        Args:
          executable: path of Chromium.
          timeout_s: how long any one answer may take.
        """
        self._executable = executable
        self._timeout_s = timeout_s
        self._number = 0
        self._buffer = b""
        self._session: str | None = None
        self.problems: list[str] = []  # uncaught exceptions and errors on the console

    def __enter__(self) -> "Browser":
        self._profile = tempfile.mkdtemp(prefix="nitsum-browser-")
        their_in, self._out = os.pipe()
        self._in, their_out = os.pipe()
        command = [self._executable, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(their_in), str(their_out), *command],
            pass_fds=(their_in, their_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its result.

        Raises:
          RuntimeError: the browser says no, or is gone.
          TimeoutError: it does not answer.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + self._timeout_s
        while True:
            answer = self._read(until)
            if answer.get("id") != self._number:
                self._note(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error'].get('message')}")
            else:
                return dict(answer["result"])

    def size(self, width: int, height: int, *, scale: float = 1.0, mobile: bool = False) -> None:
        """Sets the size of the window in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def scheme(self, name: str) -> None:
        """What the page is told that its reader prefers: "light" or "dark"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def open(self, url: str) -> None:
        """Goes to a page; does not wait for it."""
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page.

        Raises:
          RuntimeError: it threw.
        """
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails'].get('text')}")
        return answer["result"].get("value")

    def wait(self, expression: str, timeout_s: float = 20.0) -> None:
        """Waits until an expression is true.

        Raises:
          TimeoutError: it does not become so.
        """
        until = time.monotonic() + timeout_s
        while not self._holds(expression):
            if time.monotonic() > until:
                raise TimeoutError(f"still not so after {timeout_s:g} s: {expression}")
            time.sleep(0.05)

    def _holds(self, expression: str) -> bool:
        try:
            return bool(self.evaluate(f"Boolean({expression})"))
        except RuntimeError:  # between two documents there is none
            return False

    def screenshot(self, path: str | pathlib.Path, *, whole: bool = True) -> None:
        """Writes a PNG of the window, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, optimizeForSpeed=False)
        pathlib.Path(path).write_bytes(base64.b64decode(answer["data"]))

    def _read(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise TimeoutError(f"the browser does not answer ({self._executable})")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise RuntimeError(f"the browser ended ({self._executable})")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details.get("text", ""))
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}".strip())
