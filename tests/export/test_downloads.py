"""Weights from the hub, played by a server on the loopback interface: whole, broken off, refused and kept in part."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar, cast

import huggingface_hub
import pytest

from export import cli
from export.checkpoints import open_checkpoint
from export.families import MODELS
from export.families.family import ModelEntry
from runtime.errors import CheckpointError
from tests.tiny_llava import TINY, write_tiny

HUB_ID = "someone/tiny"
ENTRY = replace(TINY, hub_id=HUB_ID)
COMMIT = "a" * 40
SHARD = "model-00002-of-00002.safetensors"


@dataclass
class Hub:
    """The files of one repository, and what goes wrong with them."""

    files: dict[str, bytes]
    status: int = 200
    code: str = ""
    cut: str = ""
    hang: str = ""
    full_reply: bytes = b""
    sent: Counter[str] = field(default_factory=Counter)

    def etag(self, name: str) -> str:
        return f"{sorted(self.files).index(name):040x}"

    def listing(self, path: str) -> object:
        if "/tree/" in path:
            return [{"type": "file", "path": n, "size": len(d), "oid": "b" * 40} for n, d in self.files.items()]
        return {"id": HUB_ID, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub = self.hub
        if hub.status != 200:
            self._send(hub.status, b"", {"X-Error-Code": hub.code} if hub.code else {}, body=body)
        elif hub.full_reply:
            self._send(200, hub.full_reply, {}, body=body)
        elif "/api/" in self.path:
            self._send(200, json.dumps(hub.listing(self.path)).encode(), {}, body=body)
        else:
            self._file(self.path.rsplit("/", 1)[-1], body=body)

    def _file(self, name: str, *, body: bool) -> None:
        hub = self.hub
        data = hub.files[name]
        headers = {"ETag": f'"{hub.etag(name)}"', "X-Repo-Commit": COMMIT}
        if body and name == hub.hang:
            self.connection.settimeout(5)
            self.connection.recv(1)  # says nothing until the other side gives up
            self.close_connection = True
        elif body and name == hub.cut:
            self._send(200, data, headers, body=False)
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self._send(200, data, headers, body=body)
            hub.sent.update([name] if body else [])

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has the tiny model in two shards; the local cache is empty."""
    folder = write_tiny(tmp_path / "source", shards=2)
    made = Hub({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": made}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    resolve = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", resolve)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.close_session()
    yield made
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def refusal() -> str:
    """The message that opening the model ends with."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(ENTRY)
    message = str(caught.value)
    assert "\n" not in message
    assert HUB_ID in message or "hub's cache" in message
    return message


def snapshot(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--someone--tiny" / "snapshots" / COMMIT


def test_a_whole_download_is_opened_and_not_repeated(hub: Hub) -> None:
    assert open_checkpoint(ENTRY).names() == tuple(TINY.tensors)
    hub.status = 500
    assert open_checkpoint(ENTRY).names() == tuple(TINY.tensors)
    assert set(hub.sent.values()) == {1}


def test_a_connection_that_ends_in_the_middle(hub: Hub) -> None:
    hub.cut = SHARD
    message = refusal()
    assert "RemoteProtocolError" in message
    assert "run the same command again to resume, files that arrived whole are kept" in message


def test_the_next_run_takes_up_what_arrived_whole(hub: Hub) -> None:
    hub.cut = SHARD
    refusal()
    arrived = set(hub.sent)
    assert arrived == set(hub.files) - {SHARD}
    hub.cut = ""
    assert open_checkpoint(ENTRY).names() == tuple(TINY.tensors)
    assert hub.sent == Counter(hub.files.keys())


def test_what_a_killed_run_left_behind_does_not_count(hub: Hub, tmp_path: Path) -> None:
    blobs = tmp_path / "cache" / "models--someone--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hub.etag(SHARD)}.1234abcd.incomplete").write_bytes(hub.files[SHARD][:100])
    assert open_checkpoint(ENTRY).names() == tuple(TINY.tensors)


def test_a_server_that_falls_silent(hub: Hub) -> None:
    hub.hang = SHARD
    message = refusal()
    assert "ReadTimeout" in message
    assert "run the same command again to resume" in message


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, "", "hf auth login"),
        (401, "RepoNotFound", "hf auth login"),
        (403, "GatedRepo", "ask for access on the model's page"),
        (403, "", "hf auth login"),
        (404, "", "HF_ENDPOINT"),
        (404, "RepoNotFound", "HF_ENDPOINT"),
        (429, "", "run the same command again to resume"),
        (500, "", "run the same command again to resume"),
        (503, "", "run the same command again to resume"),
    ],
)
def test_a_hub_that_refuses(hub: Hub, status: int, code: str, says: str) -> None:
    hub.status, hub.code = status, code
    message = refusal()
    assert str(status) in message
    assert says in message
    assert "--weights DIR" in message


@pytest.mark.parametrize("reply", [b"<html>Sign in to the network</html>", b"{}", b"[]"])
def test_a_network_that_answers_in_the_hubs_place(hub: Hub, reply: bytes) -> None:
    hub.full_reply = reply
    assert "cannot be downloaded" in refusal()


def test_nobody_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert "ConnectError" in refusal()


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_rest: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", refuse)
    message = refusal()
    assert os.strerror(errno.ENOSPC) in message
    assert "set HF_HOME to a folder on a larger disk, and run again to resume" in message


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert "set HF_HOME to a folder that can be written" in refusal()


def test_no_home_folder(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/hub")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert "set HF_HOME to a folder that can be written" in refusal()


def test_an_extension_that_raises_its_own_errors(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign(Exception):
        """What a compiled downloader raises."""

    def refuse(*_args: object, **_rest: object) -> None:
        raise Foreign("token refresh failed\nwith more below")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", refuse)
    assert "(Foreign: token refresh failed)" in refusal()


def test_the_command_line_ends_in_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cast(dict[str, ModelEntry], MODELS), "tiny", ENTRY)
    hub.cut = SHARD
    words = ["--model", "tiny", "--keep", "4", "--backend", "onnx", "--only", "vision", "-q"]
    assert cli.main(["export", *words, "--output-dir", str(tmp_path / "out")], version="0") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pruneport: error: ")
    assert captured.err.count("\n") == 1
    assert not any((tmp_path / "out").glob("*"))


# --- what lies in the cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
@pytest.mark.parametrize("name", [SHARD, "model.safetensors.index.json", "config.json"])
def test_half_a_file_under_its_final_name_is_named_and_replaced(hub: Hub, tmp_path: Path, name: str, keep: int) -> None:
    open_checkpoint(ENTRY)
    blob = (snapshot(tmp_path) / name).resolve()
    blob.write_bytes(blob.read_bytes()[:keep])
    assert f"delete {blob} from the hub's cache and run the same command" in refusal()
    blob.unlink()
    assert open_checkpoint(ENTRY).names() == tuple(TINY.tensors)
    assert hub.sent == Counter([*hub.files, name])


def test_a_missing_shard_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    open_checkpoint(ENTRY)
    (snapshot(tmp_path) / SHARD).resolve().unlink()
    assert open_checkpoint(ENTRY).names() == tuple(TINY.tensors)
    assert hub.sent == Counter([*hub.files, SHARD])


def test_a_missing_shard_without_a_connection(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_checkpoint(ENTRY)
    (snapshot(tmp_path) / SHARD).resolve().unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "connect to the network" in refusal()


def test_an_index_that_names_more_than_the_hub_has(hub: Hub) -> None:
    index = json.loads(hub.files["model.safetensors.index.json"])
    index["weight_map"]["lm_head.weight"] = "model-00003-of-00003.safetensors"
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert "without model-00003-of-00003.safetensors) is incomplete and cannot be completed" in refusal()


def test_an_index_that_leads_out_of_the_cache_is_not_called_damaged(hub: Hub) -> None:
    index = json.loads(hub.files["model.safetensors.index.json"])
    index["weight_map"]["lm_head.weight"] = "/etc/passwd"
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(CheckpointError, match="only plain file names") as caught:
        open_checkpoint(ENTRY)
    assert "delete" not in str(caught.value)
