"""Where cells run: in processes of this machine, or on the machines of a Ray cluster."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from export.memory import available_bytes
from export.sweep.process import Ended, Job, home, run
from runtime.errors import RequestError

if TYPE_CHECKING:
    from export.sweep.cell import Cell

# What the check of a bundle takes while it times an answer: see `runtime.session.default_threads`.
_MOST_THREADS = 4
_KNOCK_S = 10.0


class NeverFits(Exception):
    """A cell that no machine here has the memory for; the text says what it needs and what there is."""


class Place(Protocol):
    """Somewhere to run cells."""

    threads: int | None

    def has_room(self, cell: Cell, running: Sequence[Cell]) -> bool:
        """Says whether the cell may start now, beside those that run; NeverFits where waiting would not help."""

    def start(self, job: Job) -> Future[Ended]:
        """Starts a cell."""

    def stop(self) -> None:
        """Ends what still runs, and waits for it."""


class Local:
    """Processes of this machine: at most `jobs` at a time, and no more than fit into memory by their forecasts."""

    def __init__(
        self,
        jobs: int | None = None,
        *,
        worker: Callable[[Job, int], Ended] = run,
        available: Callable[[], int] = available_bytes,
    ) -> None:
        cores = os.cpu_count() or 1
        # As many cores for each as its check uses, or the times in its report would be those of a crowd.
        self._jobs = max(1, cores // _MOST_THREADS) if jobs is None else jobs
        self.threads = max(1, cores // self._jobs) if self._jobs > 1 else None
        self._worker = worker
        self._available = available
        self._idle_bytes = 0
        self._pool = ThreadPoolExecutor(self._jobs)
        self._lifeline, self._held = os.pipe()

    def has_room(self, cell: Cell, running: Sequence[Cell]) -> bool:
        """See Place. Cells that run may yet grow up to their forecasts, and so may programs of others."""
        if len(running) >= self._jobs:
            return False
        free = self._available()
        if not running:
            self._idle_bytes = free
            if cell.ram_bytes > free and not cell.forced:
                raise NeverFits(
                    f"needs about {_gib(cell.ram_bytes)} of RAM, {_gib(free)} are available while no cell runs; "
                    "close other programs, take a larger machine, or try it all the same with `force: true`"
                )
            return True
        return cell.ram_bytes <= min(free, self._idle_bytes - sum(other.ram_bytes for other in running))

    def start(self, job: Job) -> Future[Ended]:
        return self._pool.submit(self._worker, job, self._lifeline)

    def stop(self) -> None:
        os.close(self._held)  # what runs ends itself
        self._pool.shutdown(wait=True)
        os.close(self._lifeline)


class Ray:
    """The machines of a Ray cluster; Ray keeps what has no room yet, by the forecast as its `memory`.

    They share the output folder with this one, and have the same pruneport.
    """

    def __init__(self, address: str) -> None:
        try:
            ray: Any = import_module("ray")
        except ImportError as error:
            raise RequestError("--ray needs Ray, not installed here; run: pip install 'pruneport[ray]'") from error
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RequestError(
                f"no Ray cluster answers at {address!r} ({what}); start one with `ray start --head`, or give "
                "`--ray local`"
            ) from error
        self._ray: Any = ray
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = [int(node.get("CPU", 0)) for node in nodes]
        self.threads: int | None = max(1, min(_MOST_THREADS, *(count for count in cores if count), _MOST_THREADS))
        self._memory = max((int(node.get("memory", 0)) for node in nodes if node.get("CPU", 0)), default=0)
        self._tasks: list[Any] = []

    def has_room(self, cell: Cell, running: Sequence[Cell]) -> bool:
        """See Place."""
        if cell.ram_bytes > self._memory and not cell.forced:
            raise NeverFits(
                f"needs about {_gib(cell.ram_bytes)} of RAM, the largest machine of the Ray cluster gives "
                f"{_gib(self._memory)}; add a larger one, or start it with more --memory"
            )
        return True

    def start(self, job: Job) -> Future[Ended]:
        """See Place. What crosses to the other machine is plain data and this one function."""

        def on_the_worker(words: dict[str, Any], home: str) -> dict[str, Any]:
            import sys
            from dataclasses import asdict
            from importlib import import_module

            sys.path.insert(0, home)
            import_module("pruneport")
            sys.path.remove(home)
            process = import_module("pruneport.export.sweep.process")
            ended: dict[str, Any] = asdict(process.run(process.Job(**words)))
            return ended

        task = self._ray.remote(on_the_worker).options(
            num_cpus=self.threads,
            memory=min(job.ram_bytes, self._memory),
            max_retries=0,
            name=Path(job.folder).name,
        )
        reference = task.remote(asdict(job), home())
        self._tasks.append(reference)
        ended: Future[Ended] = Future()

        def hand_on(future: Future[dict[str, Any]]) -> None:
            if (error := future.exception()) is not None:
                ended.set_exception(error)
            else:
                ended.set_result(Ended(**future.result()))

        reference.future().add_done_callback(hand_on)
        return ended

    def stop(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task, force=True)  # means nothing to one that has ended
        self._ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at HOST:PORT; Ray itself would try for minutes."""
    if found := re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+)\]?:(\d{1,5})", address):
        socket.create_connection((found[1], int(found[2])), timeout=_KNOCK_S).close()


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
