"""The README against the code: it is short, what it names is there, and what it says to type can be typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.peer_systems import rows as peer_rows
from docs.tables import backends, measured
from export.families import MODELS
from tests.docs.test_docs import anchors, check_commands, check_flags, links

MOST_LINES = 200
MOST_WORDS = 1800


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def table(text: str, title: str) -> list[list[str]]:
    """The rows below the heading of the one table of a part of the README."""
    part = text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("|")][2:]


def test_it_is_short(readme: str) -> None:
    assert len(readme.splitlines()) <= MOST_LINES
    assert len(readme.split()) <= MOST_WORDS


def test_links_lead_somewhere(readme: str, root: Path) -> None:
    found = links(readme)
    assert found
    for path, anchor in found:
        target = root / (path or "README.md")
        assert target.is_file(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), (path, anchor)


def test_pages_and_how_to_pages_are_linked(readme: str, root: Path) -> None:
    """A reader who has only this file gets everywhere, by the index of the backends at the latest."""
    linked = {path for path, _ in links(readme)}
    pages = {path.relative_to(root).as_posix() for path in (root / "docs").rglob("*.md")}
    assert pages - linked == {"docs/index.md"}


def test_every_backend_is_listed(readme: str) -> None:
    rows = [(target, re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", name)) for target, name, _, _ in table(readme, "Backends")]
    firsts = {target: name for name, target in reversed([(n, t) for n, (t, _) in backends.BACKENDS.items()])}
    assert rows == [
        (target, f"{name} (default)" if firsts[target] == name else name)
        for name, (target, _) in backends.BACKENDS.items()
    ]


def test_every_backend_is_checked_here_as_its_index_says(readme: str, root: Path) -> None:
    index = (root / "docs/backends/index.md").read_text(encoding="utf-8")
    known = {row[0].strip("`"): row[1] for row in table(index, "What is known of each")}
    word = re.compile("not run|ran|emulated|evaluated")
    for _, name, _, checked in table(readme, "Backends"):
        backend = re.findall(r"\[([^\]]+)\]", name)[0]
        assert word.findall(known[backend]) == word.findall(checked), backend


def test_what_it_brings_is_what_was_measured(readme: str) -> None:
    (result,) = measured.results("peers.json")
    shown = table(readme, "What is pruned")
    assert shown in [[list(peer_rows.cells(row)) for row in rows] for rows in peer_rows.groups(result["rows"]).values()]
    assert list(dict.fromkeys(cells[0].partition("-")[0] for cells in shown))[:2] == ["pruneport", "llama.cpp"]


def test_every_model_is_named(readme: str) -> None:
    for name in MODELS:
        assert name in readme or name.removeprefix("llava-1.5-").upper() in readme, name


def test_every_room_is_there(readme: str, root: Path) -> None:
    listed = {name.rstrip("/") for cells in table(readme, "Rooms") for name in re.findall(r"`([^`]+)`", cells[0])}
    for name in listed:
        assert (root / name).exists(), name
    packages = {path.parent.name for path in root.glob("*/__init__.py")}
    assert packages <= listed


def test_every_make_target_is_there(readme: str, root: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"\bmake ([a-z-]+)", readme)
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_ci_runs_what_it_is_said_to_run(readme: str, root: Path) -> None:
    part = readme.split("\n## Development\n", 1)[1]
    steps = re.findall(r"^(?:\S+=\S+ )?make ([a-z-]+)", (root / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"^    (?:\S+=\S+ )?make ([a-z-]+)", part, re.MULTILINE)
    assert named
    assert set(named) <= set(steps)


def test_flags_are_those_of_the_command_line(readme: str) -> None:
    check_flags(readme)


def test_commands_are_understood(readme: str, tmp_path: Path) -> None:
    assert check_commands(readme, tmp_path) >= 3
