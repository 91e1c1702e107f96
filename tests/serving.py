"""A server of `pruneport serve` in a process of its own, and what a page gets from it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.conftest import ROOT


@dataclass(frozen=True)
class Served:
    """A running server: where it is, and the folder that it may write into."""

    port: int
    folder: Path
    process: subprocess.Popen[str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: bytes | Iterator[bytes] | None = None, **headers: str
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body, as the page itself would get them; `headers` change what it says."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        said = {"Host": f"127.0.0.1:{self.port}", "Origin": self.address}
        said |= {name.replace("_", "-"): text for name, text in headers.items()}
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, text in said.items():
            if text:
                connection.putheader(name, text)
        if isinstance(body, bytes) and "Content_Length" not in headers:
            connection.putheader("Content-Length", str(len(body)))
        chunked = body is not None and not isinstance(body, bytes)
        if chunked:
            connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders(body, encode_chunked=chunked)
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders()), answer.read()
        connection.close()
        return found

    def post(self, path: str, body: bytes | dict[str, Any], status: int = 200) -> dict[str, Any]:
        """What is answered to the page."""
        got, _, said = self.ask("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())
        assert got == status, said
        decoded: dict[str, Any] = json.loads(said)
        return decoded

    def events(self, **asked: Any) -> list[dict[str, Any]]:
        """Everything that an answer streams."""
        status, headers, said = self.ask("POST", "/answer", json.dumps(asked).encode())
        assert (status, headers["content-type"]) == (200, "application/x-ndjson"), said
        return [json.loads(line) for line in said.splitlines()]


class Shown(NamedTuple):
    """Image tokens that the page draws as kept, and an answer."""

    kept: list[int]
    answer: str


@contextmanager
def served(bundle: Path, folder: Path) -> Iterator[Served]:
    """A server in a process of its own, ended as a person ends it; what it says then is looked at."""
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "pruneport", "serve", str(bundle), "--port", "0", "-q"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:"), process.communicate()
    try:
        yield Served(int(address.rstrip("/").rpartition(":")[2]), folder, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (130, "", "pruneport: interrupted, nothing was written\n")
        assert not list(folder.iterdir())
    finally:
        process.kill()
        process.wait()


def png(photo: np.ndarray, path: Path) -> bytes:
    Image.fromarray(photo).save(path)
    return path.read_bytes()


def text(events: list[dict[str, Any]], side: str) -> str:
    """What one side answered, of all that was streamed."""
    return "".join(event.get("piece", "") for event in events if event.get("side") == side)


def on_the_page(bundle: Path, folder: Path, photo: np.ndarray, question: str, keeps: Sequence[int]) -> dict[int, Shown]:
    """What the page shows of a photo and answers about it, at each keep."""
    folder.mkdir()
    with served(bundle, folder / "tmp") as server:
        status, _, said = server.ask("GET", "/bundle")
        assert (status, json.loads(said)["keeps"]) == (200, list(keeps))
        name = server.post("/photo", png(photo, folder / "photo.png"))["photo"]
        return {
            keep: Shown(
                server.post("/kept", {"photo": name, "keep": keep})["kept"],
                text(server.events(photo=name, keep=keep, question=question), "bundle"),
            )
            for keep in keeps
        }
