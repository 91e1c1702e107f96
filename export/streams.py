"""Standard output and error for one command: they take any text, and a reader who leaves does not end the command."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from runtime.errors import OutputError
from runtime.names import spelt


class Stream:
    """A text stream that spells what its encoding lacks and, once it cannot be written, swallows the rest.

    `lost` is the error of the first write that failed.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Writes text in any characters."""
        encoding = self.encoding or "utf-8"
        fitting = spelt(text).encode(encoding, "backslashreplace").decode(encoding)
        try:
            self._stream.write(fitting)
        except OSError as err:
            self._lose(err)
        return len(text)

    def write_path(self, path: Path) -> None:
        """Writes a line that is the path as the file system has it, whatever the encoding: it is there to be used."""
        buffer = getattr(self._stream, "buffer", None)
        if buffer is None:
            self.write(f"{path}\n")
            return
        try:
            self._stream.flush()
            buffer.write(os.fsencode(path) + b"\n")
        except OSError as err:
            self._lose(err)

    def flush(self) -> None:
        """Hands on what is buffered."""
        try:
            self._stream.flush()
        except OSError as err:
            self._lose(err)

    def check(self) -> None:
        """Raises OutputError when something was lost; that a reader had enough and left is no error."""
        self.flush()
        if self.lost is not None and not isinstance(self.lost, BrokenPipeError):
            raise OutputError(f"standard output cannot be written: {self.lost.strerror or self.lost}")

    def _lose(self, err: OSError) -> None:
        self.lost = err
        # The interpreter would write what is left in the buffer once more when it ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def standard_streams() -> Iterator[tuple[Stream, Stream]]:
    """Puts a Stream in the place of standard output and of standard error; closed ones lead nowhere."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Takes the lowest free number. A file of the bundle that got it would be written into by whatever prints.
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    # Python has None for a stream that was closed before it started.
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # open as long as the streams are
    output, error = (Stream(stream if stream is not None else nowhere) for stream in before)
    sys.stdout, sys.stderr = output, error  # all else that is asked of a stream is handed on
    try:
        yield output, error
    finally:
        output.flush()
        error.flush()
        sys.stdout, sys.stderr = before
        nowhere.close()
