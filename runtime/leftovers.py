"""Folders that exports work in until a bundle is whole: made with a lock, taken over or removed after a kill.

A folder is called `.NAME.partial-PID@HOST`. Its export holds a lock on it, which the system lets go of when the process
ends, however it ends: unlike the number of a process, a lock is never somebody else's by chance.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import OutputError
from runtime.names import readable

# In such a folder: the stages that are finished (export/stages.py), of which the bundle itself has nothing.
STAGES = "stages.json"
_MOST_STAGES_BYTES = 16 * 2**20
_NAME = re.compile(r"\..+\.partial-(?P<rest>.+)", re.DOTALL)
_OWN = re.compile(r"\d+(-\d+)?@(?P<host>.+)", re.DOTALL)


@dataclass(frozen=True)
class Leftover:
    """A folder that an export worked in; `why_kept` says why it stays, and is empty for one that was removed.

    `stages` is what its STAGES held, where it was removed and had one.
    """

    path: Path
    size_bytes: int
    why_kept: str = ""
    stages: bytes = b""

    def __str__(self) -> str:
        if self.why_kept:
            return f"left {readable(self.path)} ({self.size_bytes} bytes): {self.why_kept}"
        return f"removed {readable(self.path)} ({self.size_bytes} bytes), which an export that was killed left behind"


def make_locked(target: Path) -> tuple[Path, int]:
    """Makes the folder to write `target` in: its path, and the open descriptor that locks it until it is closed.

    Raises OSError.
    """
    number = 0
    while True:
        again = f"-{number}" if number else ""
        path = target.parent / f".{target.name}.partial-{os.getpid()}{again}@{_host()}"
        number += 1
        try:
            path.mkdir()
        except FileExistsError:  # another thread's, or of a process that had the same number
            continue
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Somebody who cleans up may have come between, and have found it without a lock.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return path, descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:
            return path, descriptor  # a file system without locks: nobody can judge it, so nobody removes it
        os.close(descriptor)


def take_over(target: Path, fits: Callable[[bytes], bool]) -> tuple[Path, int] | None:
    """Locks a folder in which a killed export of `target` left a STAGES that `fits`; returns what `make_locked` does.

    None where there is none: what a living export works in, one on another computer, or what cannot be locked is
    never taken.
    """
    if not target.parent.is_dir():
        return None
    for path, rest in _partials(target.parent):
        own = _OWN.fullmatch(rest)
        if path.name != f".{target.name}.partial-{rest}" or own is None or own["host"] != _host():
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have renamed it or removed it.
            if os.path.samestat(os.fstat(descriptor), path.stat()) and fits(read_stages(path)):
                return path, descriptor
        except OSError:
            pass
        os.close(descriptor)
    return None


def read_stages(folder: Path) -> bytes:
    """What the STAGES of a folder holds; nothing where there is none, or none that an export wrote."""
    path = folder / STAGES
    try:
        status = path.lstat()
        return path.read_bytes() if stat.S_ISREG(status.st_mode) and status.st_size <= _MOST_STAGES_BYTES else b""
    except OSError:
        return b""


def clean(folder: Path) -> tuple[Leftover, ...]:
    """Removes what killed exports left in a folder; returns all that is there of exports, by name.

    What a living export, one on another computer, or one that cannot be judged works in stays. Raises OutputError for
    a folder that cannot be listed.
    """
    return tuple(_judged(path, rest) for path, rest in list(_partials(folder)))


def _partials(folder: Path) -> Iterator[tuple[Path, str]]:
    """The folders that exports work in, by name, and what says whose they are."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError as err:
        raise OutputError(
            f"{folder} cannot be listed: {err.strerror}; give the folder that exports write into"
        ) from err
    return iter([(folder / name, match["rest"]) for name in names if (match := _NAME.fullmatch(name))])


def _judged(path: Path, rest: str) -> Leftover:
    size = _size_bytes(path)
    own = _OWN.fullmatch(rest)
    if own is None:
        return Leftover(path, size, "nothing says whose it is; remove it yourself when no export runs")
    if own["host"] != _host():
        host = readable(own["host"])
        return Leftover(path, size, f"it was made on {host}; run `pruneport clean` there, or remove it yourself")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as err:
        return Leftover(path, size, f"it cannot be opened: {err.strerror}")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stages = read_stages(path)
        shutil.rmtree(path)
    except BlockingIOError:
        return Leftover(path, size, "its export is running")
    except OSError as err:
        return Leftover(path, size, f"it cannot be removed: {err.strerror}")
    finally:
        os.close(descriptor)
    return Leftover(path, size, stages=stages)


def _size_bytes(folder: Path) -> int:
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(parent, name))
            except OSError:  # a living export may take its own files away
                continue
            size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", platform.node())[:64] or "unnamed"
