"""Folders that benchmarks/peers.py makes once and uses as long as what they are made from stays the same."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MADE_FROM = "made-from"


class StepError(Exception):
    """Something that was needed could not be made."""


def digest(sources: Iterable[str], *settings: object) -> str:
    """A hash over the code in `sources`, files and folders from the root of the checkout, and over settings."""
    found = hashlib.sha256(repr(settings).encode())
    for source in sources:
        path = ROOT / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()


def kept(folder: Path, made_from: str, make: Callable[[Path], None]) -> Path:
    """The folder, made anew by `make` into an empty one unless it is there and was made from the same."""
    mark = folder / MADE_FROM
    if mark.is_file() and mark.read_text() == made_from:
        return folder
    print(f"making {folder}", flush=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    (partial / MADE_FROM).write_text(made_from)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def run(*command: str) -> None:
    """Runs one step of the making behind everything else; StepError with the end of what it said when it fails."""
    done = subprocess.run(("nice", "-n", "15", *command), capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-1000:]
        raise StepError(f"{' '.join(command)} ended with {done.returncode}: {said}")
