"""Workers of benchmarks/peers.py taking turns: how they are started, kept within memory, stepped and stopped."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.peer_systems.rows import QUIET_CORES

# What is watched while a worker computes: how often, in seconds.
_WATCH_S = 0.25
_QUIET_WINDOW_S = 1.5
# Others' settings of threads must not reach the workers, which are told theirs.
_THREAD_SETTINGS = ("OMP_", "MKL_", "GOMP_", "KMP_", "OPENBLAS_")


class WorkerError(Exception):
    """A worker that ended, or that took more memory than it may."""


def busy_s() -> float:
    """Seconds that all cores together have worked since the machine started."""
    times = psutil.cpu_times()
    fields = ("user", "nice", "system", "irq", "softirq", "steal")
    return float(sum(getattr(times, field, 0.0) for field in fields))


def wait_for_quiet(patience_s: float) -> None:
    """Returns when others take little of the machine, or have not for `patience_s`."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        before = busy_s()
        time.sleep(_QUIET_WINDOW_S)
        if (busy_s() - before) / _QUIET_WINDOW_S < QUIET_CORES:
            return


class Worker:
    """A system's process: one line in, one line of JSON out."""

    def __init__(self, command: Sequence[str], *, log: Path, limit_bytes: int, root: Path) -> None:
        """Starts it, and returns when it is ready. WorkerError when it does not come so far."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(_THREAD_SETTINGS)}
        self._limit_bytes, self._log = limit_bytes, log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**env, "PYTHONPATH": str(root)},
            )
        self._seen = psutil.Process(self._process.pid)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._lines = self._process.stdin, queue.Queue[str | None]()
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        self.ready = self._answer()

    def _read(self, lines: IO[str]) -> None:
        """Fills the queue until the process has closed its end, which None says."""
        with lines:
            for line in lines:
                if line.startswith("{"):  # libraries may print other things
                    self._lines.put(line)
        self._lines.put(None)

    def ask(self, line: str) -> dict[str, Any]:
        """Sends a line and returns the answer. WorkerError when there is none."""
        with suppress(BrokenPipeError):  # the answer says that it has ended, and why
            self._stdin.write(f"{line}\n")
            self._stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        while True:
            try:
                line = self._lines.get(timeout=_WATCH_S)
            except queue.Empty:
                self._check_memory()
                continue
            if line is None:
                code = self._process.wait()
                self.stop()
                raise WorkerError(f"ended with {code}: {self._log.read_text(errors='replace').strip()[-500:]}")
            answer: dict[str, Any] = json.loads(line)
            return answer

    def _check_memory(self) -> None:
        try:
            resident = self._seen.memory_info().rss
        except psutil.NoSuchProcess:
            return  # the end of its lines says so
        if resident > self._limit_bytes:
            self.stop()
            raise WorkerError(f"took more than the {self._limit_bytes / 2**30:.1f} GiB of memory that were free for it")

    def cpu_s(self) -> float:
        """Seconds that its threads have worked."""
        times = self._seen.cpu_times()
        return float(times.user + times.system)

    @property
    def peak_rss_bytes(self) -> int:
        """The highest resident memory since it was started (Linux)."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def stop(self) -> None:
        """Ends the process, if it has not, and waits for its end."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        with suppress(BrokenPipeError):
            self._stdin.close()


def stopped_for(name: str, alive: Sequence[str], needs: Mapping[str, int], budget_bytes: int) -> list[str]:
    """Those of `alive`, least recently used first, that must stop so that `name` fits into the budget beside the rest.

    All of them where it is not known yet what it needs.
    """
    if name not in needs:
        return list(alive)
    stopped, left = [], list(alive)
    while left and needs[name] + sum(needs[other] for other in left) > budget_bytes:
        stopped.append(left.pop(0))
    return stopped


class Crew:
    """The workers of a run, of which as many live at once as fit into memory; those used last are kept."""

    def __init__(self, commands: Mapping[str, Sequence[str]], *, logs: Path, budget_bytes: int, root: Path) -> None:
        self._commands, self._logs, self._root = commands, logs, root
        self._budget_bytes = budget_bytes
        self._alive: dict[str, Worker] = {}
        self._needs: dict[str, int] = {}
        self.starts: dict[str, int] = dict.fromkeys(commands, 0)
        logs.mkdir(parents=True, exist_ok=True)

    def worker(self, name: str) -> tuple[Worker, bool]:
        """The system's worker, and whether it was started just now. WorkerError when it cannot be started."""
        if name in self._alive:
            self._alive[name] = self._alive.pop(name)  # used last
            return self._alive[name], False
        for other in stopped_for(name, list(self._alive), self._needs, self._budget_bytes):
            self.stop(other)
        free = psutil.virtual_memory().available
        if self._needs.get(name, 0) > free:
            raise WorkerError(f"needs {self._needs[name] / 2**30:.1f} GiB of memory; {free / 2**30:.1f} are free")
        limit = min(self._budget_bytes, free)
        log = self._logs / f"{name}.log"
        self._alive[name] = Worker(self._commands[name], log=log, limit_bytes=limit, root=self._root)
        self.starts[name] += 1
        return self._alive[name], True

    def measured(self, name: str) -> int:
        """Notes the peak of a worker's memory, in bytes, and returns the highest so far."""
        self._needs[name] = max(self._needs.get(name, 0), self._alive[name].peak_rss_bytes)
        return self._needs[name]

    def stop(self, name: str) -> None:
        """Ends one worker, if it is there."""
        if name in self._alive:
            self._alive.pop(name).stop()

    def stop_all(self) -> None:
        """Ends all workers."""
        for name in list(self._alive):
            self.stop(name)
