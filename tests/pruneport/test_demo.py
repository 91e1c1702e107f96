"""What `make demo` does after the install, and the command it ends with."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import CommandLine

pytestmark = pytest.mark.slow

Run = subprocess.CompletedProcess[str]


def test_demo_ends_with_the_table(demo: Run) -> None:
    assert demo.returncode == 0, demo.stdout + demo.stderr
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in demo.stdout.splitlines() if "│" in line}
    assert rows["verdict"] == "passed"
    assert rows["image tokens"] == "576 -> 64 (11% kept)"
    assert "outputs within bounds" in rows["parity"]
    assert "the same as on the desktop" in rows["kept tokens"]
    assert "twin" in rows["vision_encoder"]
    assert "pruned/twin" in rows["vision_encoder"]
    assert "in 4 partitions of 5 graphs" in rows["delegates"]
    assert "files" in rows["files"]
    assert "desktop CPU" in rows["measured on"]
    assert demo.stdout.splitlines()[-1].startswith("next: ")


def test_demo_shows_every_stage(demo: Run) -> None:
    """A slow machine says of a long stage what is left of it, in lines of their own."""
    said = [line for line in demo.stderr.splitlines() if line.startswith("[")]
    stages = [line for line in said if not line.endswith(" left")]
    assert [line.split("]")[0][1:] for line in stages] == [f"{n}/12" for n in range(1, 13)]
    assert all(" s   peak " in line and "GiB" in line for line in stages)


def test_demo_is_not_noisy(demo: Run) -> None:
    """Only the plan, the stages and their notes: nothing that a library says while all goes well."""
    plan = (
        "pocket: ",
        "  makes ",
        "           ",
        "  vision ",
        "  text ",
        "  target ",
        "  weights ",
        "  photo ",
        "  needs ",
    )
    strange = [line for line in demo.stderr.splitlines() if not line.startswith(("[", "      ", *plan))]
    assert strange == []


def test_demo_leaves_two_bundles_and_nothing_else(demo: Run, xnnpack_bundle: Path) -> None:
    assert sorted(path.name for path in xnnpack_bundle.parent.iterdir()) == [
        "pocket-keep64-android-xnnpack",
        "pocket-keepall-android-xnnpack",
    ]


def test_demo_names_a_command_that_works(demo: Run, command_line: CommandLine) -> None:
    line = next(line for line in demo.stdout.splitlines() if line.startswith("next: "))
    words = shlex.split(line)
    assert words[words.index("pruneport") + 1] == "verify"
    done = command_line(*words[words.index("pruneport") + 1 :])
    assert done.returncode == 0, done.stdout + done.stderr
