"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table with one line for each row; a bar inside a cell stays a bar."""
    lines = [list(heads), ["---"] * len(heads), *(list(row) for row in rows)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def code(words: Iterable[object]) -> str:
    """Returns words as code, separated by commas; `none` for none."""
    return ", ".join(f"`{word}`" for word in words) or "none"
