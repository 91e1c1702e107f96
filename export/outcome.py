"""How a command ends: its exit code, the last screen, and what it says to type next."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from runtime.errors import RequestError

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.check.verdict import Verdict

PASSED = 0
FAILED = 1  # the engine ran and did not compute what the desktop model computes
BAD_REQUEST = 2
NOT_CHECKED = 3  # a step could not be run here, so nothing is known about it
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are RequestErrors, so that there is one place that prints and exits."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; see {self.prog} --help")


def show(bundle: Bundle, verdict: Verdict, *, next_command: str) -> None:
    """Prints what was found, and what to type next."""
    from rich.console import Console
    from rich.text import Text

    from runtime.report import terminal_table

    console = Console()
    console.print(terminal_table(bundle, verdict))
    # On one line, however long: it is there to be copied.
    console.print(Text.assemble("next: ", (next_command, "bold cyan")), soft_wrap=True)


def command(*words: str) -> str:
    """How to start pruneport again in the way it was started: the script if that ran, else this interpreter."""
    if Path(sys.argv[0]).name == "pruneport":
        return shlex.join(["pruneport", *words])
    interpreter = Path(sys.executable)
    near = interpreter.is_relative_to(Path.cwd())
    return shlex.join([str(interpreter.relative_to(Path.cwd())) if near else "python", "-m", "pruneport", *words])


def exit_code(verdict: Verdict) -> int:
    """The exit code that says what a verdict says."""
    return {"passed": PASSED, "failed": FAILED, "not checked": NOT_CHECKED}[verdict.outcome]
