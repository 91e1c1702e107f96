"""The parts of the pages that are made from code and data, by the names that pages call them.

A page holds a line such as `[made: flags of export](tables/flags.py)`, which leads a reader of the plain file to what
makes the part. When the site is built the part stands in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

from docs.tables import api, backends, bounds, errors, flags, interfaces, measured, methods, rules, schema

PARTS: Mapping[str, Callable[[], str]] = {
    "flags of export": partial(flags.table, "export"),
    "flags of ask": partial(flags.table, "ask"),
    "flags of serve": partial(flags.table, "serve"),
    "flags of sweep": partial(flags.table, "sweep"),
    "flags of device bench": partial(flags.table, "device bench"),
    "flags of device ask": partial(flags.table, "device ask"),
    "flags of report": partial(flags.table, "report"),
    "verbs": flags.verbs,
    "models": flags.models,
    "methods": methods.table,
    "methods in full": methods.page,
    "chips": flags.chips,
    "exit codes": flags.exit_codes,
    "backends": backends.table,
    **{f"choices of {name}": partial(backends.choices, name) for name in backends.BACKENDS},
    "bounds": bounds.table,
    "reasons of the bounds": bounds.reasons,
    "schema": schema.page,
    "rules of the Neural Engine": rules.table,
    "errors": errors.page,
    "names": api.names,
    "reference": api.reference,
    "interface of a family": partial(
        interfaces.reference, "export", "Family", "Geometry", "TensorEntry", "Frame", "Seen", "Desktop", "ModelEntry"
    ),
    "interface of a method": partial(
        interfaces.reference, "pruning", "Method", "Features", "Kept", "Trace", "Recovery", "Cuts"
    ),
    "interface of a backend": partial(
        interfaces.reference, "export", "Backend", "Recipe", "Variants", "Lower", "LoweredGraph"
    ),
    "interface of a device": partial(
        interfaces.reference,
        "runtime",
        "Device",
        "Job",
        "Timing",
        "Findings",
        "GraphFinding",
        "AnswerFinding",
        "Trouble",
    ),
    **measured.PARTS,
}

_LINE = re.compile(r"^\[made: (?P<name>[^\]]+)\]\([^)]*\)$", re.MULTILINE)


def named(markdown: str) -> list[str]:
    """The parts that a page asks for, in order."""
    return [found["name"] for found in _LINE.finditer(markdown)]


def filled(markdown: str) -> str:
    """Puts the parts in their places. KeyError for a name that nothing makes."""

    def part(found: re.Match[str]) -> str:
        if found["name"] not in PARTS:
            raise KeyError(f"nothing makes the part {found['name']!r}; there are: {', '.join(PARTS)}")
        return PARTS[found["name"]]().strip()

    return _LINE.sub(part, markdown)
