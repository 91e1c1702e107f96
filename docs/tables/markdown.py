"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table with one line for each row; a bar inside a cell stays a bar."""
    lines = [list(heads), ["---"] * len(heads), *([_cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    """A bar ends a cell unless it stands in code."""
    parts = text.split("`")
    return "`".join(part if index % 2 else part.replace("|", r"\|") for index, part in enumerate(parts))


def code(words: Iterable[object]) -> str:
    """Returns words as code, separated by commas; `none` for none."""
    return ", ".join(f"`{word}`" for word in words) or "none"
