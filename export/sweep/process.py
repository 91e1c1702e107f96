"""Runs one cell in a process of its own, so that a crash, or the system stopping it, is the end of one cell only."""

from __future__ import annotations

import hashlib
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

LOG = "log.txt"
_CHILD = Path(__file__).with_name("child.py")
_ROOMS = ("export", "pruning", "runtime")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told, in plain words: it may run on another machine.

    `folder` is the cell's own, where its log goes; `cwd` is where relative paths in `flags` begin; `source` is the
    `source_sha256` of who sends it; `ram_bytes` is the forecast.
    """

    folder: str
    flags: tuple[str, ...]
    cwd: str
    source: str
    ram_bytes: int
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a cell's process ended. `exit_code` is negative for a signal, None where there was no process, see `error`.

    `started` is in seconds since 1970; `peak_bytes` is the most resident memory of the process.
    """

    exit_code: int | None
    started: float
    seconds: float
    host: str
    peak_bytes: int = 0
    error: str = ""


def source_sha256() -> str:
    """Hashes the files of the rooms that decide what an export makes: a changed one is another pruneport."""
    rooms = Path(__file__).resolve().parent.parent.parent
    digest = hashlib.sha256()
    for room in _ROOMS:
        for path in sorted((rooms / room).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(f"{path.relative_to(rooms).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def run(job: Job, lifeline: int | None = None) -> Ended:
    """Runs `pruneport export` with the job's flags and waits for its end; what it prints goes into the cell's log.

    The process ends itself when the other end of the pipe `lifeline` is closed, without one when this process ends.
    """
    if source_sha256() != job.source:
        return _not_run("this machine has another pruneport than the one that started the sweep; install the same here")
    folder = Path(job.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / LOG).open("wb")
    except OSError as error:
        return _not_run(f"{folder} cannot be written: {error.strerror}; all workers must reach the output folder")
    own: tuple[int, ...] = ()
    if lifeline is None:
        own = os.pipe()
        lifeline = own[0]
    environment = dict(os.environ)
    if job.threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(job.threads))
    started, clock = time.time(), time.monotonic()
    try:
        with log:
            process = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD), home(), "export", *job.flags],
                stdin=lifeline,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=job.cwd,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the sweep, which closes the pipe
            )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        _end_group(process.pid)
    except OSError as error:
        return _not_run(f"no process could be started: {error.strerror}")
    finally:
        for descriptor in own:
            os.close(descriptor)
    return Ended(
        exit_code=process.returncode,
        started=started,
        seconds=time.monotonic() - clock,
        host=platform.node(),
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


def last_line(log: Path, begins: str = "") -> str:
    """The last line of a log that has something in it and begins so; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**14))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip() and line.startswith(begins)), "")


def _not_run(why: str) -> Ended:
    return Ended(exit_code=None, started=time.time(), seconds=0.0, host=platform.node(), error=why)


def home() -> str:
    """The folder that pruneport lies in."""
    spec = find_spec("pruneport")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).resolve().parent.parent)


def _end_group(group: int) -> None:
    """Ends what the process started and left."""
    with suppress(ProcessLookupError, PermissionError):  # nothing is left
        os.killpg(group, signal.SIGKILL)
