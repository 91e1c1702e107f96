"""What is recorded of pocket: it is of the weights that are here, and one command makes all of it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import pocket_records
from benchmarks.pocket_records import records, stamps, weights_sha256, with_constants, with_demo


def test_what_lands_with_the_weights_is_of_them() -> None:
    """`make pocket-records` makes it again."""
    old = [name for name, record in records().items() if record.short and stamps().get(name) != weights_sha256()]
    assert old == []


def test_every_result_that_names_pocket_can_be_made_again(root: Path) -> None:
    known = {path for record in records().values() for path in record.files}
    assert all(path.is_file() for path in known)
    named = {path for path in (root / "benchmarks/results").glob("*.json") if "pocket" in path.read_text("utf-8")}
    assert named <= known
    assert set(stamps()) <= set(records())


@pytest.mark.parametrize("backend", pocket_records.FORECASTS)
def test_constants_of_the_forecast_follow_the_results(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pocket_records.DURATION.read_text(encoding="utf-8")
    assert with_constants(source, backend) == source
    for path in pocket_records.RESULTS.glob(f"export_*-{backend}.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        result["seconds"] += 1 if "part" in path.name else 1000
        (tmp_path / path.name).write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(pocket_records, "RESULTS", tmp_path)
    changed = with_constants(source, backend)
    assert [line for line in changed.splitlines() if line not in source.splitlines()] == [
        line for line in changed.splitlines() if line.startswith(f'    "{backend}": Measured(')
    ]


TABLE = """[12/12] finish
┌──────────┬────────┐
│ verdict  │ passed │
│ delegates│ XNNPACK│
└──────────┴────────┘
next: verify
 red
┏━━━━━━━━━┳━━━━━┓
┃         ┃ 64  ┃
┡━━━━━━━━━╇━━━━━┩
│ What?   │ red │
└─────────┴─────┘
"""


def test_the_readme_shows_both_tables() -> None:
    page = "before\n" + pocket_records.BEGIN + "old\n" + pocket_records.END + "behind\n"
    shown = with_demo(page, TABLE)
    assert shown.startswith("before\n")
    assert shown.endswith(f"{pocket_records.END}behind\n")
    lines = shown.split(pocket_records.BEGIN)[1].split(pocket_records.END)[0].splitlines()
    assert lines == ["```text", *TABLE.splitlines()[1:3], "[...]", *TABLE.splitlines()[7:], "```"]
    with pytest.raises(SystemExit, match="left as it is"):
        with_demo(page, TABLE.replace("┏", "+"))
