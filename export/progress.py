"""Tells the user on stderr which stage an export is in, how long each took and how much memory was needed so far."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from runtime.latency import peak_rss_bytes


class Stage:
    """One running stage; what `note` is told is shown when the stage ends."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Progress:
    """Numbers the stages of one export; a live line on a terminal, plain lines anywhere else, nothing when quiet."""

    def __init__(self, *, stages: int, quiet: bool = False, stream: TextIO | None = None) -> None:
        if stages < 1:
            raise ValueError(f"stages={stages} must be at least 1")
        self.stages = stages
        self.quiet = quiet
        self.stream = sys.stderr if stream is None else stream
        self._begun = 0
        self._peak_bytes = 0

    @contextmanager
    def stage(self, label: str) -> Iterator[Stage]:
        """Runs the block as the next stage; an exception in it is marked and passes on."""
        self._begun += 1
        stage = Stage(label)
        head = f"[{self._begun}/{self.stages}] {label}"
        start = time.perf_counter()
        outcome = "stopped"
        try:
            with self._live(head):
                yield stage
            outcome = ""
        finally:
            self._line(head, time.perf_counter() - start, outcome, stage.notes)

    @contextmanager
    def _live(self, head: str) -> Iterator[None]:
        if self.quiet or not self.stream.isatty():
            yield
            return
        from rich.console import Console

        console = Console(file=self.stream)
        if console.is_dumb_terminal or not console.encoding.startswith("utf"):
            yield  # neither a line that is drawn again and again, nor the characters it is drawn with
            return
        from rich.markup import escape
        from rich.progress import Progress as RichProgress
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with RichProgress(*columns, console=console, transient=True) as live:
            live.add_task(escape(head), total=None)
            yield

    def _line(self, head: str, seconds: float, outcome: str, notes: list[str]) -> None:
        # Kept here because measuring latency resets the process's own high-water mark.
        self._peak_bytes = max(self._peak_bytes, peak_rss_bytes())
        if self.quiet:
            return
        tail = f"  {outcome}" if outcome else ""
        print(
            f"{head:<44}{seconds:>8.1f} s   peak {self._peak_bytes / 2**30:.2f} GiB{tail}", file=self.stream, flush=True
        )
        for note in notes:
            print(f"      {note}", file=self.stream, flush=True)


@contextmanager
def library_noise(*, shown: bool) -> Iterator[None]:
    """Hides warnings and log lines below ERROR that torch and the converters emit while all goes well."""
    if shown:
        yield
        return
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
