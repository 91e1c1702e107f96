"""Shows on a stream how a sweep goes on: a live table on a terminal, else a line for every cell that ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from export.sweep.cell import Cell, Record
from export.sweep.process import last_line
from export.sweep.report import counted, named_in, summary_table
from export.sweep.walk import Result

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table as RichTable

    from runtime.report import Table

STYLES = {"passed": "green", "failed": "bold red", "error": "bold red", "running": "cyan"}
# Columns that a narrow terminal does without, in this order; verdict and flags are always there.
_LEFT_OUT_FIRST = (
    "GiB",
    "image ready ms",
    "kept",
    "token ms",
    "MB",
    "s",
    "answer",
    "TTFT ms",
    "vision ms",
    "worst rel",
)
# Letters: space and frame beside a column, the verdict with its own, and the least for what runs now.
_GAP, _MARK_WIDTH, _NOW_WIDTH = 3, 15, 24
# Beside the rows: head, lines of the frame, and the count.
_FRAME_LINES = 6


class Board:
    """The state of every cell. Show it with `live`, which does nothing where nobody looks."""

    def __init__(self, cells: Sequence[Cell], *, stream: TextIO, quiet: bool = False) -> None:
        self._cells = list(cells)
        self._stream = stream
        self._quiet = quiet
        self._numbers = {id(cell): number for number, cell in enumerate(self._cells)}
        self._records: dict[int, Record] = {}
        self._started: dict[int, float] = {}
        self._is_live = False

    @contextmanager
    def live(self) -> Iterator[None]:
        """Draws the table again and again while the block runs, on a terminal that can."""
        console = None if self._quiet else _terminal(self._stream)
        if console is None:
            yield
            return
        from rich.live import Live

        self._is_live = True
        with Live(self, console=console, refresh_per_second=2, transient=True):
            yield
        self._is_live = False

    def started(self, cell: Cell) -> None:
        self._started[self._numbers[id(cell)]] = time.monotonic()

    def ended(self, cell: Cell, record: Record, *, before: bool = False) -> None:
        number = self._numbers[id(cell)]
        self._started.pop(number, None)
        self._records[number] = record
        if self._quiet or self._is_live:
            return
        words = named_in(cell, self._cells)
        took = "as before" if before else f"{record.seconds:.1f} s   peak {record.ram_peak_bytes / 2**30:.2f} GiB"
        head = f"[{len(self._records)}/{len(self._cells)}] {record.status:<11} {words}"
        print(f"{head:<60} {took if record.host else ''}".rstrip(), file=self._stream, flush=True)
        if record.detail:
            print(f"      {record.detail}", file=self._stream, flush=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        most = max(3, (options.height or console.height) - _FRAME_LINES)
        running = {number: self._now(number, since) for number, since in self._started.copy().items()}
        yield terminal_table(self.result(), options.max_width, only=self._shown(most), running=running)
        yield Text(counted(self.result(), running=running))

    def result(self) -> Result:
        """What has come of the cells so far."""
        return Result(tuple(self._cells), tuple(self._records.get(number) for number in range(len(self._cells))))

    def _shown(self, most: int) -> list[int]:
        """The cells to show where not all have room: those that run, then what went wrong, then the rest."""

        def rank(number: int) -> int:
            record = self._records.get(number)
            if number in self._started:
                return 0
            if record is not None:
                return 3 if record.status == "passed" else 1
            return 2

        numbers = sorted(range(len(self._cells)), key=rank)[:most]
        return sorted(numbers)

    def _now(self, number: int, since: float) -> str:
        """What a running cell has done last, by the line that its log ends with."""
        stage = last_line(self._cells[number].log, "[").split("]")[-1].split("  ")[0].strip()
        return f"{time.monotonic() - since:.0f} s{stage and f', done: {stage}'}"


def terminal_table(
    result: Result, width: int, *, only: Sequence[int] | None = None, running: Mapping[int, str] | None = None
) -> RichTable:
    """The cells as a table `width` letters wide, `only` those of the given numbers, with the columns that have room.

    `running` says what each cell that runs does now.
    """
    from rich.table import Table as RichTable
    from rich.text import Text

    table = summary_table(result)
    columns = _fitting(table, width - _MARK_WIDTH - (0 if running is None else _NOW_WIDTH))
    shown = RichTable()
    shown.add_column("", no_wrap=True)
    for column in columns:
        numeric = table.columns[column] in table.numeric
        shown.add_column(table.columns[column], justify="right" if numeric else "left", no_wrap=numeric)
    if running is not None:
        shown.add_column("now", overflow="ellipsis", no_wrap=True)
    for number, (mark, row) in enumerate(table.marked()):
        if only is not None and number not in only:
            continue
        now = [] if running is None else [running.get(number, "")]
        status = "running" if running and number in running else mark
        cells = [row[column] for column in columns]
        shown.add_row(Text(status, style=STYLES.get(status, "yellow")), *map(Text, (*cells, *now)))
    return shown


def _fitting(table: Table, width: int) -> list[int]:
    """The numbers of the columns that have room side by side; the report has them all."""
    needs = {
        name: max(map(len, (name, *(row[column] for row in table.rows)))) + _GAP
        for column, name in enumerate(table.columns)
    }
    for name in _LEFT_OUT_FIRST:
        if sum(needs.values()) > width:
            needs.pop(name, None)
    return [column for column, name in enumerate(table.columns) if name in needs]


def _terminal(stream: TextIO) -> Console | None:
    """The terminal behind a stream; None where there is none, or none that a table can be drawn on again and again."""
    if not stream.isatty():
        return None
    from rich.console import Console

    console = Console(file=stream)
    return None if console.is_dumb_terminal or not console.encoding.startswith("utf") else console
