"""What came of a sweep, for people and programs: the table, report.html and results.json."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec

from export.sweep.cell import Cell, Numbers, Record, pretty
from export.sweep.matrix import Words, as_flags, spelt_out
from export.sweep.walk import Result
from runtime.names import plural, readable
from runtime.report import Table

RESULTS, PAGE = "results.json", "report.html"
_TEMPLATE = "report.html.j2"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One cell in results.json; `record` is None where it has not been come to, `folder` where it could not be planned.

    `command` makes its bundle again; `beside` counts the cells whose processes ran on the same machine in the
    same minutes, which makes times longer.
    """

    words: Words
    command: str
    folder: str | None
    beside: int
    record: Record | None


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """results.json."""

    matrix: str
    pruneport: str
    outcome: str
    cells: tuple[Row, ...]
    schema_version: int = 1


def write(result: Result, output: Path, *, matrix: str, version: str) -> None:
    """Writes results.json and report.html, each in one step. Raises OSError."""
    rows = tuple(
        Row(
            words=cell.words,
            command=command(cell),
            folder=None if cell.refusal else cell.folder.relative_to(output.absolute()).as_posix(),
            beside=_beside(record, result.records),
            record=record,
        )
        for cell, record in zip(result.cells, result.records, strict=True)
    )
    results = Results(matrix=matrix, pruneport=version, outcome=result.outcome, cells=rows)
    for name, content in ((RESULTS, pretty(results)), (PAGE, _page(result, results).encode())):
        partial = output / f".{name}"
        partial.write_bytes(content)
        partial.replace(output / name)


def command(cell: Cell) -> str:
    """How to make the cell's bundle by itself."""
    return shlex.join(["pruneport", "export", *as_flags(cell.words)])


def varying(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The flags in which cells differ, or the first two where there is one cell only."""
    flags = tuple(dict.fromkeys(flag for cell in cells for flag in cell.words))
    return tuple(flag for flag in flags if len({cell.words.get(flag) for cell in cells}) > 1) or flags[:2]


def named_in(cell: Cell, cells: Sequence[Cell]) -> str:
    """What tells a cell from the others: `keep=64 backend=onnx`."""
    return spelt_out({flag: cell.words[flag] for flag in varying(cells) if flag in cell.words})


def troubles(result: Result) -> list[str]:
    """A line for every cell that has come to something else than passed."""
    return [
        f"{record.status}: {named_in(cell, result.cells)}: {record.detail}"
        for cell, record in zip(result.cells, result.records, strict=True)
        if record is not None and record.status != "passed"
    ]


def summary_table(result: Result) -> Table:
    """One row a cell: where cells differ, and those numbers that any of them has."""
    flags = varying(result.cells)
    shown = {
        name: form
        for name, form in _NUMBERS.items()
        if any(record and record.numbers and form(record.numbers) for record in result.records)
    }
    rows = []
    for cell, record in zip(result.cells, result.records, strict=True):
        numbers = record.numbers if record else None
        rows.append(
            (
                *(readable(cell.words.get(flag, "")) for flag in flags),
                f"{record.seconds:.0f}" if record and record.host else "",
                f"{record.ram_peak_bytes / 2**30:.1f}" if record and record.ram_peak_bytes else "",
                *(form(numbers) if numbers else "" for form in shown.values()),
            )
        )
    heads = ("s", "GiB", *shown)
    marks = tuple(record.status if record else "waiting" for record in result.records)
    return Table(columns=(*flags, *heads), rows=tuple(rows), numeric=frozenset(heads), marks=marks)


def counted(result: Result, *, running: Collection[int] = ()) -> str:
    """`3 cells: 2 passed, 1 running`, with the numbers of those that run."""
    statuses = [
        record.status if record else "running" if number in running else "waiting"
        for number, record in enumerate(result.records)
    ]
    parts = [f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)]
    return f"{plural(len(statuses), 'cell')}: {', '.join(parts)}"


def crowded(result: Result) -> str:
    """A sentence for times that were not measured alone; empty where all were."""
    most = max((_beside(record, result.records) for record in result.records), default=0)
    if not most:
        return ""
    return (
        f"Up to {most + 1} cells ran side by side on one machine, so their times compare only roughly; "
        "with --jobs 1 each is measured alone."
    )


def _form(of: Callable[[Numbers], float | None], form: str, scale: float = 1.0) -> Callable[[Numbers], str]:
    def text(numbers: Numbers) -> str:
        value = of(numbers)
        return "" if value is None else format(value / scale, form)

    return text


# Heads of columns, with their units, and what stands below.
_NUMBERS: dict[str, Callable[[Numbers], str]] = {
    "worst rel": _form(lambda numbers: numbers.worst_rel, ".1e"),
    "kept": _form(lambda numbers: numbers.kept_overlap, ".0%"),
    "answer": lambda n: "" if n.answer_same is None else f"{n.answer_same}/{n.answer_tokens}",
    "vision ms": _form(lambda numbers: numbers.vision_ms, ".1f"),
    "image ready ms": _form(lambda numbers: numbers.image_ready_ms, ".1f"),
    "TTFT ms": _form(lambda numbers: numbers.ttft_ms, ".1f"),
    "token ms": _form(lambda numbers: numbers.token_ms, ".2f"),
    "MB": _form(lambda numbers: numbers.bundle_bytes, ".1f", 1e6),
}


def _beside(record: Record | None, records: Sequence[Record | None]) -> int:
    """How many others ran on the machine of `record` at once, at most, while it did."""
    if record is None or not record.host:
        return 0
    others = [other for other in records if other is not None and other is not record and other.host == record.host]
    # The number of those that run only grows where one begins.
    moments = [max(record.started, other.started) for other in others]
    return max((_run_at(moment, others) for moment in moments if _run_at(moment, [record])), default=0)


def _run_at(moment: float, records: Sequence[Record]) -> int:
    return sum(record.started <= moment < record.started + record.seconds for record in records)


def _page(result: Result, results: Results) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    content: dict[str, Any] = {
        "name": results.matrix,
        "version": results.pruneport,
        "outcome": results.outcome,
        "counted": counted(result),
        "crowded": crowded(result),
        "common": _common(result.cells),
        "devices": sorted({row.numbers.device for row in result.records if row and row.numbers}),
        "table": summary_table(result),
        "cells": results.cells,
    }
    return environment.get_template(_TEMPLATE).render(content).rstrip() + "\n"


def _common(cells: Sequence[Cell]) -> str:
    different = varying(cells)
    first = cells[0].words
    return ", ".join(f"{flag} {readable(word)}" for flag, word in first.items() if flag not in different)
