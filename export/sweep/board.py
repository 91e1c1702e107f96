"""Shows on a stream how a sweep goes on: a live table on a terminal, else a line for every cell that ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from export.sweep.cell import Cell, Record
from export.sweep.matrix import spelt_out
from export.sweep.process import last_line
from export.sweep.report import counted, summary_table, varying
from export.sweep.walk import Result

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table as RichTable

STYLES = {"passed": "green", "failed": "bold red", "error": "bold red", "running": "cyan"}
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
        words = spelt_out({flag: cell.words[flag] for flag in varying(self._cells) if flag in cell.words})
        took = "as before" if before else f"{record.seconds:.1f} s   peak {record.ram_peak_bytes / 2**30:.2f} GiB"
        head = f"[{len(self._records)}/{len(self._cells)}] {record.status:<11} {words}"
        print(f"{head:<60} {took if record.host else ''}".rstrip(), file=self._stream, flush=True)
        if record.detail:
            print(f"      {record.detail}", file=self._stream, flush=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        most = max(3, (options.height or console.height) - _FRAME_LINES)
        running = {number: self._now(number, since) for number, since in self._started.copy().items()}
        yield terminal_table(self.result(), only=self._shown(most), running=running)
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
    result: Result, *, only: Sequence[int] | None = None, running: Mapping[int, str] | None = None
) -> RichTable:
    """The cells as a table for the terminal, `only` those of the given numbers; `running` says what each does now."""
    from rich.table import Table as RichTable
    from rich.text import Text

    table = summary_table(result)
    shown = RichTable()
    shown.add_column("")
    for column in table.columns:
        shown.add_column(column, justify="right" if column in table.numeric else "left")
    if running is not None:
        shown.add_column("now", overflow="ellipsis", no_wrap=True)
    for number, (mark, row) in enumerate(table.marked()):
        if only is not None and number not in only:
            continue
        now = [] if running is None else [running.get(number, "")]
        status = "running" if running and number in running else mark
        shown.add_row(Text(status, style=STYLES.get(status, "yellow")), *map(Text, (*row, *now)))
    return shown


def _terminal(stream: TextIO) -> Console | None:
    """The terminal behind a stream; None where there is none, or none that a table can be drawn on again and again."""
    if not stream.isatty():
        return None
    from rich.console import Console

    console = Console(file=stream)
    return None if console.is_dumb_terminal or not console.encoding.startswith("utf") else console
