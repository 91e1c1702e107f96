"""What `pruneport device` and `pruneport report` refuse, and how: one message, exit code 2, nothing left."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from export import cli
from tests.sample_bundle import Sample, make_bundle

DEVICES = "List of devices attached\n"
PIXEL = "39061FDJ\tdevice usb:1-1 product:panther model:Pixel_7 device:panther transport_id:1\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("cli") / "bundle", Sample())


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command whose adb is a shell script, in this process."""

    def run(*words: str | Path, adb: str) -> Done:
        path = tmp_path / "adb"
        path.write_text(f"#!/bin/sh\n{adb}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        code = cli.main([str(word) for word in words], version="0")
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


def lists(devices: str) -> str:
    return f"cat <<'E'\n{DEVICES}{devices.replace(chr(9), ' ')}\nE"


@pytest.mark.parametrize(
    ("devices", "words", "message"),
    [
        ("", (), "no device is connected; plug one in with USB debugging on"),
        ("R58X\tunauthorized usb:1-1\n", (), "its state is 'unauthorized': unlock it and allow USB debugging"),
        ("R58X\toffline\n", (), "its state is 'offline': unplug it and plug it in again"),
        ("R58X\tno permissions (missing udev rules?); see [http]\n", (), "this user may not open it"),
        ("R58X\trecovery\n", (), "wait until it has started"),
        (f"{PIXEL}R58X\tdevice usb:1-2\n", (), "2 devices are connected: 39061FDJ (device), R58X (device); choose one"),
        (PIXEL, ("--serial", "R58X"), "there is no device 'R58X'; adb lists: 39061FDJ (device)"),
    ],
)
def test_which_device(
    bundle: Path, tmp_path: Path, run: Run, devices: str, words: tuple[str, ...], message: str
) -> None:
    done = run("device", "bench", bundle, *words, "--output-dir", tmp_path / "out", adb=lists(devices))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["device", "list"], version="0") == 2
    assert "adb is not installed; install Android's platform tools" in capsys.readouterr().err


def test_a_broken_adb(bundle: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    adb = f'[ "$1" = devices ] && {{ {lists(PIXEL)}\nexit 0; }}\necho "error: closed" >&2; exit 1'
    done = run("device", "bench", bundle, "--output-dir", tmp_path / "out", adb=adb)
    assert done.returncode == 2
    assert "the connection to 39061FDJ was lost (error: closed); plug it in" in done.stderr
    monkeypatch.setenv("COLUMNS", "200")
    listed = run("device", "list", adb=adb)
    assert listed.returncode == 0
    assert "the connection to 39061FDJ was lost" in " ".join(listed.stdout.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("device",), "device needs an action: list, bench, ask, pull, clean"),
        (("device", "bnech"), "unknown action 'bnech', did you mean 'bench'?"),
        (("device", "bench", "B", "--kep", "64"), "unknown argument '--kep', did you mean '--keep'?"),
        (("device", "bench", "nowhere"), "nowhere does not exist"),
        (("device", "bench", "B", "--runs", "-1"), "runs=-1"),
        (("device", "bench", "B", "--runs", "many"), "runs='many'"),
        (("device", "bench", "B", "--threads", "1000"), "threads=1000"),
        (("device", "bench", "B", "--most-celsius", "nan"), "most_celsius"),
        (("device", "bench", "B", "--most-celsius", "400"), "most_celsius=400 must lie above 0"),
        (("device", "bench", "B", "--timeout", "0"), "timeout=0 must lie above 0"),
        (("device", "bench", "B", "--keep", "5"), "keep=5"),
        (("device", "bench", "B", "--twin", "B"), "is pruned itself"),
        (("device", "bench", "B", "--on", "carrier-pigeon"), "carrier-pigeon"),
        (("device", "bench", "B", "--on", "ai-hub"), "--on ai-hub needs --serial NAME"),
        (("device", "bench", "B", "--on", "devicectl", "--runner", "x"), "--runner means nothing with --on devicectl"),
        (("device", "bench", "B", "--on", "devicectl"), "iPhones need a Mac with Xcode"),
        (("device", "ask", "B", "no.jpg", "What?"), "tokenizer"),
        (("report", "nowhere"), "report needs --reference BUNDLE"),
        (("report", "nowhere", "--reference", "B"), "nowhere has no findings.json"),
        (("report", "B", "--reference", "nowhere"), "nowhere does not exist"),
    ],
)
def test_what_is_refused(bundle: Path, run: Run, words: tuple[str, ...], message: str) -> None:
    done = run(*(bundle if word == "B" else word for word in words), adb=lists(PIXEL))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
