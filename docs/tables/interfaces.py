"""The classes that whoever adds to the house fills in, wherever they live."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROOMS = ("export", "pruning", "runtime")


def home_of(name: str) -> str:
    """Returns the module that defines a class. LookupError unless there is exactly one."""
    found = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    if len(found) != 1:
        raise LookupError(f"{len(found)} classes are called {name}, one is wanted: {', '.join(found) or 'none'}")
    return found[0].removesuffix(".__init__")


def reference(*names: str) -> str:
    """Returns what the documentation tool makes of the docstrings and signatures of these classes."""
    return "\n".join(
        f"::: {home_of(name)}.{name}\n    options:\n      heading: {home_of(name)}.{name}\n      members: true\n"
        f"      show_if_no_docstring: true\n"
        for name in names
    )
