"""The processes behind the page, as the server sees them: each has one bundle open and does one job at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import numpy as np

import runtime.errors
from runtime.errors import EngineError, PruneportError
from runtime.serve.messages import STOP, Event, PhotoJob, line

_CHILD = Path(__file__).with_name("child.py")
_LONGEST_LINE = 2**24
_GRACE_S = 2.0


class Side:
    """A bundle at one keep in a process of its own, which is started when it is first needed, and anew after a crash.

    `folder` is where its engine may leave temporary files. `emulated` is known once it is open: its times then say
    nothing.
    """

    def __init__(self, path: Path, keep: int, folder: Path, *, verbose: bool = False) -> None:
        self._path, self._keep, self._folder, self._verbose = path, keep, folder, verbose
        self._process: asyncio.subprocess.Process | None = None
        self._number = 0
        self._closed = False
        self.emulated = False

    async def open(self) -> None:
        """Starts the process and waits until its graphs are open. Raises what `open_bundle` raises."""
        if self._closed:
            raise EngineError(f"{self._path} is closed: the server is ending; start it again")
        if self._process is not None and self._process.returncode is None:
            return
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            str(_CHILD),
            str(self._path.absolute()),
            str(self._keep),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=None if self._verbose else asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the server, which closes the pipe
            env={**os.environ, "TMPDIR": str(self._folder)},
            limit=_LONGEST_LINE,
        )
        self._number = 0
        try:
            event = await self._next(self._process)
        except BaseException:
            await self._end()
            raise
        if event.error is not None:
            await self._end()
            raise _raised(event)
        self.emulated = event.emulated

    async def work(self, keep: int, pixels: np.ndarray, question: str | None = None) -> AsyncGenerator[Event]:
        """Does one job; who stops reading ends it. Raises PruneportError for what the job was refused with."""
        await self.open()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        self._number += 1
        number, ended = self._number, False
        try:
            process.stdin.write(line(PhotoJob.of(number, keep, pixels, question)))
            await process.stdin.drain()
            while not ended:
                event = await self._next(process)
                if event.job != number:
                    continue  # what an earlier job said before it noticed that nobody reads
                ended = event.end
                if event.error is not None:
                    raise _raised(event)
                yield event
        except ConnectionError as err:
            raise await self._crash(process) from err
        finally:
            if not ended and process.returncode is None:
                process.stdin.write(STOP)

    async def _next(self, process: asyncio.subprocess.Process) -> Event:
        assert process.stdout is not None
        told = await process.stdout.readline()
        if not told.endswith(b"\n"):
            raise await self._crash(process)
        return msgspec.json.decode(told, type=Event)

    async def _crash(self, process: asyncio.subprocess.Process) -> EngineError:
        code = await process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if self._closed:
            return EngineError("the server is ending; start it again")
        return EngineError(
            f"the process that has {self._path.name} open ended ({how}), perhaps for lack of memory; the next question "
            "starts it anew, and -v shows what it says"
        )

    async def close(self) -> None:
        """Ends the process."""
        self._closed = True
        await self._end()

    async def _end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _GRACE_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _raised(event: Event) -> PruneportError:
    """The error that an event tells, of its own class."""
    kind = getattr(runtime.errors, event.kind or "", PruneportError)
    assert issubclass(kind, PruneportError)
    return kind(event.error)
