"""The walk of a sweep: plan every cell, run those that are not done yet, and keep the report up to date."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from export.sweep.cell import Cell, Record
from export.sweep.matrix import spelt_out
from export.sweep.places import NeverFits, Place
from export.sweep.process import Ended
from runtime.errors import OutputError

_LOCK = ".lock"
# Then it is looked again whether there is room: programs of others come and go. A signal that comes just before a
# wait without a limit would be noticed at its end only.
_LOOK_AGAIN_S = 1.0


class Screen(Protocol):
    """Whoever is shown how a sweep goes on."""

    def started(self, cell: Cell) -> None:
        """A cell has begun."""

    def ended(self, cell: Cell, record: Record, *, before: bool = False) -> None:
        """A cell has ended, in an earlier run where `before` says so."""


@dataclass(frozen=True)
class Result:
    """Every cell with what came of it, in the order of the matrix; None for one that was not come to."""

    cells: tuple[Cell, ...]
    records: tuple[Record | None, ...]

    @property
    def outcome(self) -> str:
        """The worst of all cells: `failed`, `not checked` or `passed`; `interrupted` where one was not come to."""
        statuses = {record.status if record else None for record in self.records}
        if None in statuses:
            return "interrupted"
        if statuses & {"failed", "error"}:
            return "failed"
        return "not checked" if "not checked" in statuses else "passed"


def list_cells(cells: Sequence[Cell]) -> Iterator[str]:
    """Says of each cell what it is, what it needs, and what is known of it, in a line."""
    for number, cell in enumerate(cells, 1):
        record = None if cell.refusal else cell.record()
        if cell.refusal:
            known = f"refused: {cell.refusal}"
        elif record is not None:
            known = f"{record.status} before"
        else:
            known = f"RAM about {cell.ram_bytes / 2**30:.1f} GiB, disk about {cell.disk_bytes / 2**30:.1f} GiB"
        yield f"[{number}/{len(cells)}] {spelt_out(cell.words)}: {known}"


def run_cells(
    cells: Sequence[Cell],
    output: Path,
    *,
    place: Callable[[], Place],
    source: str,
    screen: Screen,
    report: Callable[[Result], None],
    verbose: bool = False,
    retry_failed: bool = False,
    reports_only: bool = False,
) -> Result:
    """Runs the cells that have no record with their key, and records what comes of each.

    A cell that fails is recorded and stays so, until `retry_failed`. One that could not start is judged anew the next
    time. `report` is called whenever there is something new. Interrupted, it ends what runs, reports and raises
    KeyboardInterrupt; the next run goes on from there. With `reports_only` a bundle's graphs go once it is checked.

    Raises OutputError where the folder is used by another sweep, cannot be written, or is too small.
    """
    records: dict[int, Record] = {}
    waiting: list[int] = []
    running: dict[Future[Ended], int] = {}

    def result() -> Result:
        return Result(tuple(cells), tuple(records.get(number) for number in range(len(cells))))

    def settle(number: int, record: Record, *, before: bool = False) -> None:
        records[number] = record
        screen.ended(cells[number], record, before=before)

    with _locked(output):
        for number, cell in enumerate(cells):
            known = None if cell.refusal else cell.record()
            if cell.refusal:
                settle(number, cell.not_run(cell.refusal))
            elif known is None or (retry_failed and known.status in ("failed", "error")):
                waiting.append(number)
            else:
                settle(number, known, before=True)
        _check_disk([cells[number] for number in waiting], output, reports_only=reports_only)
        report(result())
        told = len(records)
        if not waiting:
            return result()
        at = place()
        try:
            while waiting or running:
                for number in tuple(waiting):
                    cell = cells[number]
                    try:
                        if not at.has_room(cell, [cells[other] for other in running.values()]):
                            continue
                    except NeverFits as why:
                        settle(number, cell.not_run(str(why)))
                    else:
                        cell.clear()
                        running[at.start(cell.job(source, at.threads, verbose=verbose))] = number
                        screen.started(cell)
                    waiting.remove(number)
                done = wait(running, timeout=_LOOK_AGAIN_S, return_when=FIRST_COMPLETED).done
                for future in done:
                    number = running.pop(future)
                    cell = cells[number]
                    record = _come_of(cell, future)
                    if record.host:
                        if reports_only:
                            cell.drop_graphs()
                        cell.write(record)
                    settle(number, record)
                if len(records) > told:
                    report(result())
                    told = len(records)
        finally:
            at.stop()
    return result()


def _come_of(cell: Cell, future: Future[Ended]) -> Record:
    error = future.exception()
    if error is None:
        return cell.judge(future.result())
    # The worker itself was lost, or had no pruneport: its machine may be back the next time.
    last = str(error).strip().splitlines()[-1] if str(error).strip() else ""
    return cell.not_run(f"its worker was lost: {type(error).__name__}: {last}")


def _check_disk(cells: Sequence[Cell], output: Path, *, reports_only: bool) -> None:
    needs = [cell.disk_bytes for cell in cells if not cell.forced]
    needed = (max(needs, default=0)) if reports_only else sum(needs)
    free = shutil.disk_usage(output).free
    if needed > free:
        way_out = "" if reports_only else "keep the reports alone with --reports-only, "
        raise OutputError(
            f"{output} has {free / 2**30:.1f} GiB free, the bundles of {len(cells)} cells need about "
            f"{needed / 2**30:.1f} GiB; {way_out}free some space, or choose another output folder"
        )


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Holds the output folder, which is made where there is none; the system lets go of it however a sweep ends."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}; choose another output folder") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another sweep is running in {output}; wait for it, or choose another output folder"
            ) from error
        yield
    finally:
        os.close(descriptor)
