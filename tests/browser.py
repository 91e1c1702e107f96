"""A headless Chromium that a test drives through a pipe, in Chromium's own DevTools protocol: keys, files, pictures."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import HEADLESS_CHROMIUM

_WAIT_S = 60.0
# What a key says beside its name: its code number and, where it writes something, the text.
_KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " "), "Escape": (27, ""), "ArrowDown": (40, "")}


class Page:
    """One page; `do` sends a command of the protocol, the rest are short forms of what a person does."""

    def __init__(self, to: int, out_of: int) -> None:
        self._to, self._from, self._held, self._number = to, out_of, b"", 0
        self._session: str | None = None
        self.happened: list[dict[str, Any]] = []
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: object) -> dict[str, Any]:
        """Sends a command, and returns what it gave."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next(_WAIT_S)
            if got.get("id") == self._number:
                assert "error" not in got, got
                result: dict[str, Any] = got["result"]
                return result
            self.happened.append(got)

    def _next(self, wait_s: float) -> dict[str, Any]:
        end = time.monotonic() + wait_s
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"Chromium said nothing in {wait_s} s"
            got = os.read(self._from, 2**20)
            assert got, "Chromium ended"
            self._held += got
        message, self._held = self._held.split(b"\0", 1)
        decoded: dict[str, Any] = json.loads(message)
        return decoded

    def until(self, method: str) -> dict[str, Any]:
        """Waits for an event, and returns what it says."""
        while True:
            found = next((event for event in self.happened if event.get("method") == method), None)
            if found is not None:
                self.happened.remove(found)
                parameters: dict[str, Any] = found["params"]
                return parameters
            self.happened.append(self._next(_WAIT_S))

    def value(self, expression: str) -> Any:
        """What an expression comes to in the page."""
        done = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, expression: str) -> None:
        """Waits until an expression is true in the page."""
        end = time.monotonic() + _WAIT_S
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression} never came true: {self.value('document.body.innerText')}"
            time.sleep(0.05)

    def go(self, address: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Opens an address in a window of this size."""
        self.size(width, height)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.do("Emulation.setEmulatedMedia", features=scheme)
        self.do("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def size(self, width: int, height: int) -> None:
        """Changes the size of the window."""
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def key(self, name: str, *, shift: bool = False) -> None:
        """Presses and releases a key, as a keyboard does."""
        number, text = _KEYS[name]
        same = {"key": name, "code": name, "windowsVirtualKeyCode": number, "modifiers": 8 * shift}
        self.do("Input.dispatchKeyEvent", type="keyDown", **same, **({"text": text} if text else {}))
        self.do("Input.dispatchKeyEvent", type="keyUp", **same)

    def tab_to(self, name: str) -> None:
        """Presses Tab until the element of that id has the focus."""
        for _ in range(30):
            if self.value("document.activeElement.id") == name:
                return
            self.key("Tab")
        raise AssertionError(f"Tab never came to {name}")

    def write(self, text: str) -> None:
        """Writes text where the focus is."""
        self.do("Input.insertText", text=text)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Saves what is seen, and with `whole` what is below, as a PNG."""
        done = self.do("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(done["data"]))


def _high_pipe() -> tuple[int, int]:
    """A pipe whose numbers are not those that Chromium expects its own at."""
    low = os.pipe()
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return read, write


@contextmanager
def open_page(profile: Path) -> Iterator[Page]:
    """An empty page of a Chromium that reaches no host but this one."""
    to_read, to_write = _high_pipe()
    from_read, from_write = _high_pipe()
    words = [
        *HEADLESS_CHROMIUM,
        "--remote-debugging-pipe",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={profile}",
        "about:blank",
    ]
    # Chromium reads commands from 3 and writes what happens to 4.
    browser = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{from_write}', "bash", *words],
        pass_fds=(to_read, from_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(from_write)
    try:
        yield Page(to_write, from_read)
    finally:
        browser.terminate()
        browser.wait(20)
        os.close(to_write)
        os.close(from_read)
