"""What `make demo` does after the install, and the command it ends with."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(root: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The demo's own command line, taken from the Makefile, with this interpreter and another folder."""
    out = tmp_path_factory.mktemp("demo")
    dry = subprocess.run(
        ["make", "-n", "demo", f"DEMO_DIR={out}"], cwd=root, capture_output=True, text=True, check=True
    )
    line = next(line for line in dry.stdout.splitlines() if "export.py" in line)
    words = shlex.split(line.lstrip("@"))
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=root, capture_output=True, text=True, timeout=300, check=False
    )


def test_demo_ends_with_the_table(demo: subprocess.CompletedProcess[str]) -> None:
    assert demo.returncode == 0, demo.stdout + demo.stderr
    for part in ("parity", "latency", "576", "64", "XNNPACK", "twin", "vision_encoder"):
        assert part.lower() in demo.stdout.lower(), part


def test_demo_shows_every_stage(demo: subprocess.CompletedProcess[str]) -> None:
    stages = [line for line in demo.stderr.splitlines() if line.startswith("[")]
    assert [line.split("]")[0][1:] for line in stages] == [f"{n}/12" for n in range(1, 13)]
    assert all(" s   peak " in line and "GiB" in line for line in stages)


def test_demo_names_a_command_that_works(demo: subprocess.CompletedProcess[str], root: Path) -> None:
    line = next(line for line in demo.stdout.splitlines() if "pruneport verify" in line)
    words = shlex.split(line[line.index("pruneport verify") :].strip(" │|"))
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_demo_writes_nothing_else(root: Path, demo: subprocess.CompletedProcess[str]) -> None:
    status = subprocess.run(["git", "status", "--short"], cwd=root, capture_output=True, text=True, check=False)
    assert "bundles" not in status.stdout
