"""The classes that whoever adds to the house fills in, wherever they live."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def _definitions(room: str, name: str) -> list[tuple[str, ast.ClassDef]]:
    return [
        (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), node)
        for path in sorted((ROOT / room).rglob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]


def reference(room: str, *names: str) -> str:
    """Returns what the documentation tool makes of classes of a room and their methods.

    LookupError unless each is there once.
    """
    return "\n".join(_one(room, name) for name in names)


def _one(room: str, name: str) -> str:
    found = _definitions(room, name)
    if len(found) != 1:
        homes = ", ".join(home for home, _ in found) or "none"
        raise LookupError(f"{len(found)} classes of {room} are called {name}, one is wanted: {homes}")
    ((home, node),) = found
    methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
    shown = [method for method in methods if not method.startswith("_") or method == "__call__"]
    return (
        f"::: {home}.{name}\n    options:\n      heading: {home}.{name}\n      members: {shown}\n"
        "      filters: []\n      show_if_no_docstring: true\n"
    )
