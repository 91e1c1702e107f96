"""Tells the user on stderr which stage an export is in, how long each took and how much memory was needed so far."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

# Before so many seconds and such a share no rate is known; a plain line says something new once in so many seconds.
_FIRST_S, _FIRST_SHARE, _EVERY_S = 10.0, 0.05, 60.0


class Stage:
    """One running stage; what `note` is told is shown when the stage ends.

    `show` is told, once a rate is known, what share of the work is done and how many seconds are left at that rate.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.notes: list[str] = []
        self.show: Callable[[float, float], None] = lambda share, left_s: None
        self._start, self._total, self._done = time.perf_counter(), 0.0, 0.0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def expect(self, total: float) -> None:
        """Says how much work there is, in any unit."""
        self._total, self._done, self._start = total, 0.0, time.perf_counter()

    def advance(self, done: float) -> None:
        """Says that so much of it is done, beside what was said before."""
        raise_if_interrupted()
        self._done += done
        elapsed = time.perf_counter() - self._start
        if elapsed >= _FIRST_S and _FIRST_SHARE * self._total <= self._done < self._total:
            self.show(self._done / self._total, elapsed * (self._total - self._done) / self._done)


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
            with self._live(head) as stage.show:
                raise_if_interrupted()
                yield stage
                raise_if_interrupted()
            outcome = ""
        finally:
            self._line(head, time.perf_counter() - start, outcome, stage.notes)

    @contextmanager
    def _live(self, head: str) -> Iterator[Callable[[float, float], None]]:
        """Says that a stage runs; what it yields shows how far it is."""
        if self.quiet:
            yield lambda share, left_s: None
            return
        if not self.stream.isatty():
            yield self._lines(head)
            return
        from rich.console import Console

        console = Console(file=self.stream)
        if console.is_dumb_terminal or not console.encoding.startswith("utf"):
            yield self._lines(head)  # neither a line that is drawn again and again, nor the characters for it
            return
        from rich.markup import escape
        from rich.progress import Progress as RichProgress
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with RichProgress(*columns, console=console, transient=True) as live:
            task = live.add_task(escape(head), total=None)
            yield lambda share, left_s: live.update(task, description=escape(f"{head}: {_far(share, left_s)}"))

    def _lines(self, head: str) -> Callable[[float, float], None]:
        """Shows how far a stage is as plain lines, now and then."""
        last = time.perf_counter()

        def show(share: float, left_s: float) -> None:
            nonlocal last
            if time.perf_counter() - last >= _EVERY_S:
                last = time.perf_counter()
                print(f"{head}: {_far(share, left_s)}", file=self.stream, flush=True)

        return show

    def _line(self, head: str, seconds: float, outcome: str, notes: list[str]) -> None:
        from runtime.latency import peak_rss_bytes  # brings numpy, which most verbs start without

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


def _far(share: float, left_s: float) -> str:
    minutes, seconds = divmod(round(left_s), 60)
    return f"{share:.0%}, about {minutes} min {seconds} s left" if minutes else f"{share:.0%}, about {seconds} s left"


_interrupted = False


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def raise_if_interrupted() -> None:
    """Raises a signal's KeyboardInterrupt once more where a library's bare `except` took the first one for its own.

    Several do, around an import or an attempt: the export went on as if nobody had pressed Ctrl-C.
    """
    if _interrupted:
        raise KeyboardInterrupt


@contextmanager
def ended_by_any_signal() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end the block the way Ctrl-C does, and none of the three be lost: see above.

    What the process was started to ignore, as by nohup or by a shell's background, stays ignored.
    """
    global _interrupted
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread, and only there handlers can be set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    ours = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
        _interrupted = False


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
