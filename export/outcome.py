"""How a command ends: its exit code, the last screen, and what it says to type next."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.ask import Said
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


def show_answers(told: Sequence[Said]) -> None:
    """Prints what a bundle and its unpruned twin said to the same questions side by side, and what it took them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    ours, twin = (
        [said for said in told if said.bundle == name] for name in dict.fromkeys(said.bundle for said in told)
    )
    table = Table(show_header=True)
    for head in ("", *(f"{len(side[0].kept)} image tokens" for side in (ours, twin))):
        table.add_column(head, overflow="fold")
    for one, other in zip(ours, twin, strict=True):
        # As they are: what a user or a model wrote in brackets is no markup.
        table.add_row(*(Text(words.strip()) for words in (one.question, one.answer, other.answer)))
    table.add_section()
    both = (ours, twin)
    table.add_row("image ready", *(f"{side[0].took.image_ready_ms:.0f} ms" for side in both))
    table.add_row("TTFT, middle", *(_middle([said.took.ttft_ms for said in side]) for side in both))
    table.add_row("KV cache", *(f"{side[-1].took.kv_cache_bytes / 1e6:.1f} MB" for side in both))
    table.add_row("peak RSS", *(f"{side[-1].took.peak_rss_bytes / 1e6:.0f} MB" for side in both))
    Console(stderr=True).print(table)


def show_kept(path: Path, photo: Path, kept: Sequence[int]) -> None:
    """Draws the image tokens that a bundle keeps of a photo, on terminals that have colours."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.color_system is None:
        return
    from runtime.bundle import read_bundle
    from runtime.image import load_photo
    from runtime.kept_picture import kept_cells

    manifest = read_bundle(path).manifest
    console.print(kept_cells(load_photo(photo), manifest.image, manifest.prune, kept), soft_wrap=True)
    console.print(
        f"{len(kept)} of {manifest.prune.image_tokens} image tokens stay: dark patches are dropped", highlight=False
    )


def _middle(times: Sequence[float | None]) -> str:
    from statistics import median

    known = [ms for ms in times if ms is not None]
    return f"{median(known):.1f} ms" if known else ""


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
