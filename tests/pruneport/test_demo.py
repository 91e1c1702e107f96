"""What `make demo` does after the install, and the command it ends with."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from runtime.bundle import read_bundle
from runtime.image import enlarged_view, load_photo
from runtime.kept_picture import draw_kept
from tests.conftest import CommandLine, demo_commands

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


def test_demo_asks_both_bundles_about_its_picture(demo: Run, xnnpack_bundle: Path, command_line: CommandLine) -> None:
    """Side by side, as the README shows it; what is answered is the weights' affair."""
    export, ask = demo_commands(xnnpack_bundle.parent)
    picture = Path(export[export.index("--image") + 1])
    assert ask.count(str(picture)) == 1
    drawn = Path(ask[ask.index("--draw") + 1])
    done = command_line(*ask[ask.index("pruneport") + 1 :])
    assert done.returncode == 0, done.stdout + done.stderr
    questions = [word for word in ask if word.endswith(("?", "."))]
    assert len(questions) > 4
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stderr.splitlines() if "│" in line]
    assert len(done.stdout.splitlines()) == 2 * len(questions)
    assert [row[0] for row in table if row[0]][-4:] == ["image ready", "TTFT, middle", "KV cache", "peak RSS"]
    kept = read_bundle(xnnpack_bundle).golden()["kept_indices"].tolist()
    manifest = read_bundle(xnnpack_bundle).manifest
    expected = draw_kept(enlarged_view(load_photo(picture), manifest.image), manifest.prune, kept)
    assert np.abs(load_photo(drawn).astype(int) - expected).mean() < 8  # what WebP loses
    drawn.unlink()


def test_demo_names_a_command_that_works(demo: Run, command_line: CommandLine) -> None:
    line = next(line for line in demo.stdout.splitlines() if line.startswith("next: "))
    words = shlex.split(line)
    assert words[words.index("pruneport") + 1] == "verify"
    done = command_line(*words[words.index("pruneport") + 1 :])
    assert done.returncode == 0, done.stdout + done.stderr
