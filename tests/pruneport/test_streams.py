"""Names and streams in any encoding, closed and broken ones: never a traceback, and reports that hold what is said."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from export.cli import main
from export.memory import available_bytes
from export.streams import Stream
from runtime.errors import OutputError
from runtime.names import readable, stored_name

NAME = os.fsdecode(b"caf\xe9.png")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_any_text_goes_into_any_encoding(encoding: str) -> None:
    raw = io.BytesIO()
    stream = Stream(io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
    print(NAME, "\u20ac \ud800", file=stream, flush=True)
    said = raw.getvalue().decode(encoding)
    assert said.startswith("caf\\xe9.png ")
    assert said.endswith(" \\ud800\n")


def test_names_are_spelt_on_one_line() -> None:
    assert readable(NAME) == "caf\\xe9.png"
    assert readable("caf\u00e9\n\x1b[31m") == "caf\u00e9\\x0a\\x1b[31m"
    assert len(stored_name(Path(os.fsdecode(b"\xff" * 255)))) == 256


@pytest.mark.parametrize("encoding", ["ascii:strict", "latin-1:strict", "utf-8:strict", "cp1252:strict"])
@pytest.mark.parametrize("words", [["verify"], ["explain"], ["ask", "x", "y"], ["clean"]], ids=lambda words: words[0])
def test_a_name_of_any_bytes_is_one_clear_error(root: Path, encoding: str, words: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pruneport", *words[:1], "-q", NAME, *words[1:]],
        cwd=root,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.startswith(b"pruneport: error: caf\\xe9.png ")
    assert run.stderr.count(b"\n") == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "> /dev/full 2>&1", "<&- >&-"])
def test_closed_and_full_streams(root: Path, closed: str) -> None:
    line = f'"{sys.executable}" -m pruneport verify -q no-bundle {closed}'
    run = subprocess.run(["sh", "-c", line], cwd=root, capture_output=True, check=False)
    assert run.returncode == 2
    assert run.stdout == b""
    assert run.stderr in (b"", b"pruneport: error: no-bundle does not exist; a bundle is the folder an export wrote, "
                               b"e.g. bundles/<name>\n")  # fmt: skip


def test_a_full_standard_output_is_an_error_and_a_reader_who_left_is_none(root: Path) -> None:
    command = f'"{sys.executable}" -m pruneport --help'
    full = subprocess.run(["sh", "-c", f"{command} > /dev/full"], cwd=root, capture_output=True, check=False)
    assert b"Traceback" not in full.stderr
    left = subprocess.run(["sh", "-c", f"{command} | true"], cwd=root, capture_output=True, check=False)
    assert (left.returncode, left.stderr) == (0, b"")
    with open("/dev/full", "w", encoding="utf-8") as file:
        stream = Stream(file)
        print("x", file=stream)
        with pytest.raises(OutputError, match="standard output cannot be written: No space left on device"):
            stream.check()


def test_nul_in_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "a\0b"], version="1") == 2
    assert capsys.readouterr().err.startswith("pruneport: error: 'a\\\\x00b' holds a NUL character")


def test_a_folder_that_is_gone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    line = f'cd "{tmp_path}/gone" && rmdir "{tmp_path}/gone" && exec "{sys.executable}" -m pruneport verify x'
    env = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run(["sh", "-c", line], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("pruneport: error: the folder that this runs in cannot be reached: ")


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "1000", "a/memory.current": "400"}),
        ("0::/outside\n", {"memory.max": "900", "memory.current": "400", "memory.stat": "anon 1\ninactive_file 100"}),
        ("4:cpu,memory:/c\n0::/\n", {"memory/c/memory.limit_in_bytes": "600", "memory/c/memory.usage_in_bytes": "0"}),
    ],
    ids=["version 2, around", "version 2, own root", "version 1"],
)
def test_a_containers_limit_counts(tmp_path: Path, groups: str, files: dict[str, str]) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    assert available_bytes(tmp_path) > 10_000
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert available_bytes(tmp_path) == 600
