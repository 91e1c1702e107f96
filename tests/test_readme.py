"""The README against the code: flags, bounds and manifest fields that it names are those there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from export.cli import build_parser
from export.models import MODELS
from runtime.bundle import Manifest
from runtime.parity import BOUNDS


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def section(readme: str, title: str) -> str:
    return readme.split(f"\n## {title}", 1)[1].split("\n## ", 1)[0]


def first_cells(text: str) -> list[str]:
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    return rows[1:]  # without the heading


def test_every_flag_is_listed(readme: str) -> None:
    listed = set(re.findall(r"--[a-z-]+", " ".join(first_cells(section(readme, "Flags")))))
    spoken = set(re.findall(r"(?<![\w-])--[a-z-]+", build_parser()[1]["export"].format_help())) - {"--help"}
    assert listed == spoken


def test_every_model_is_listed(readme: str) -> None:
    row = next(line for line in section(readme, "Flags").splitlines() if line.startswith("| `--model`"))
    assert set(re.findall(r"`([^`]+)`", row)) - {"--model"} == set(MODELS)


def test_every_manifest_field_is_listed(readme: str) -> None:
    listed = set(re.findall(r"`(\w+)`", " ".join(first_cells(section(readme, "The bundle")))))
    assert listed == set(Manifest.__struct_fields__)


def test_bounds_are_those_of_the_code(readme: str) -> None:
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in section(readme, 'What "equal" means').splitlines()
        if line.startswith("| ")
    ][1:]
    assert table == [
        [
            bound.precision,
            "reported only" if bound.most_rel is None else f"{bound.most_rel:g}",
            "reported only" if bound.least_cosine is None else f"{bound.least_cosine:g}",
            f"{bound.least_overlap:.0%}",
        ]
        for bound in BOUNDS.values()
    ]
