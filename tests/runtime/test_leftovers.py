"""What killed exports leave: folders whose process is gone are removed and named, all others stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from export.cli import main
from runtime.bundle import BundleWriter
from runtime.errors import OutputError
from runtime.leftovers import clean

WRITING = """
import sys, time
from pathlib import Path
from runtime.bundle import BundleWriter
with BundleWriter(Path(sys.argv[1]) / "killed") as writer:
    (writer.path / "weights").write_bytes(bytes(1000))
    print(writer.path, flush=True)
    time.sleep(600)
"""


def _killed(folder: Path, root: Path) -> Path:
    """The folder that a process which was killed worked in."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITING, folder], stdout=subprocess.PIPE, text=True, cwd=root
    ) as child:
        assert child.stdout is not None
        path = Path(child.stdout.readline().strip())
        assert [str(one) for one in clean(folder)] == [f"left {path} (1000 bytes): its export is running"]
        child.send_signal(signal.SIGKILL)
    return path


def test_a_killed_export_is_removed_and_a_living_one_is_not(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _killed(tmp_path, root)
    assert (path / "weights").is_file()
    with BundleWriter(tmp_path / "living") as writer:
        assert main(["clean", str(tmp_path)], version="1") == 0
        assert capsys.readouterr().out.splitlines() == [
            f"removed {path} (1000 bytes), which an export that was killed left behind",
            f"left {writer.path} (0 bytes): its export is running",
        ]
        assert (not path.exists(), writer.path.is_dir()) == (True, True)
    assert main(["clean", str(tmp_path)], version="1") == 0
    assert capsys.readouterr().out == f"nothing to remove in {tmp_path}\n"


def test_what_cannot_be_judged_is_left_and_named(tmp_path: Path) -> None:
    for name in (".x.partial-1", ".x.partial-1@another.host", ".hidden", "x.partial-1"):
        (tmp_path / name).mkdir()
    (tmp_path / f".x.partial-2@{os.uname().nodename}").symlink_to(".hidden")
    assert [one.why_kept.partition(";")[0] for one in clean(tmp_path)] == [
        "nothing says whose it is",
        "it was made on another.host",
    ]
    assert len(list(tmp_path.iterdir())) == 5


def test_two_exports_of_one_process_do_not_share_a_folder(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "x") as one, BundleWriter(tmp_path / "x") as other:
        assert one.path != other.path
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="none cannot be listed: No such file or directory"):
        clean(tmp_path / "none")
