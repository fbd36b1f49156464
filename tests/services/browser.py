"""Debian's Chromium without a window, told what to do over a pair of pipes, by its DevTools protocol.

It resolves no host, so whatever a page asks for from outside fails, and is among `requested`.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGES = {"chromium": "chromium"}
"""Debian's package of each program."""
PATIENCE = 300.0
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)


def missing_packages() -> list[str]:
    """Debian packages to install before `page` can run."""
    return sorted({package for program, package in PACKAGES.items() if shutil.which(program) is None})


class Page:
    """One page. `faults`: what its console said of errors; `requested`: the addresses that it asked for."""

    def __init__(self, write: int, read: int) -> None:
        self.faults: list[str] = []
        self.requested: list[str] = []
        self._write, self._read = write, read
        self._rest, self._number, self._loaded = b"", 0, False
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self._ask(f"{domain}.enable")

    _session: str | None = None

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Loads a file as a window of this size shows it, in a light or a dark world."""
        mobile = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self._ask("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self._ask("Page.navigate", url=path.as_uri())
        self._wait(lambda: self._loaded)
        # Charts are drawn when their size is known, which is a frame later.
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def run(self, expression: str) -> Any:
        """The value of an expression of JavaScript; RuntimeError where it throws."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self._ask("Runtime.evaluate", **asked)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """The pointer."""
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answers: list[dict[str, Any]] = []

        def answered() -> bool:
            return bool(answers)

        self._wait(answered, answers)
        if "error" in answers[0]:
            raise RuntimeError(f"{method}: {answers[0]['error']}")
        result: dict[str, Any] = answers[0]["result"]
        return result

    def _wait(self, until: Callable[[], bool], answers: list[dict[str, Any]] | None = None) -> None:
        deadline = time.monotonic() + PATIENCE
        while not until():
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            data = os.read(self._read, 1 << 20)
            if not data:
                raise RuntimeError("the browser has ended")
            *whole, self._rest = (self._rest + data).split(b"\0")
            for message in map(json.loads, whole):
                if answers is not None and message.get("id") == self._number:
                    answers.append(message)
                else:
                    self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, event: str, facts: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            self.requested.append(facts["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.faults.append(str(facts["exceptionDetails"].get("exception", facts)))
        elif event == "Log.entryAdded" and facts["entry"]["level"] == "error":
            self.faults.append(facts["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and facts["type"] == "error":
            self.faults.append(str(facts["args"]))


@contextmanager
def page(profile: Path) -> Iterator[Page]:
    """A browser with its files in `profile`, and a page in it. RuntimeError or TimeoutError where it fails."""
    (ours, theirs_out), (theirs_in, we_write) = os.pipe(), os.pipe()
    # The protocol's pipes are its file descriptors 3 and 4.
    script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
    command = ["bash", "-c", script, "bash", "chromium", *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        command, pass_fds=[theirs_in, theirs_out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(we_write, ours)
    finally:
        process.terminate()
        process.wait()
        os.close(ours)
        os.close(we_write)
