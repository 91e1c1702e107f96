"""The bounds that an engine's outputs must meet, from those that the check applies."""

from __future__ import annotations

from docs.tables.markdown import table as markdown_table
from runtime.check.parity import BOUNDS

NOT_JUDGED = "reported only"


def table() -> str:
    """Returns the bounds, from fine arithmetic to coarse."""
    rows = [
        (
            bound.precision,
            NOT_JUDGED if bound.most_rel is None else f"{bound.most_rel:g}",
            NOT_JUDGED if bound.least_cosine is None else f"{bound.least_cosine:g}",
            f"{bound.least_overlap:.0%}",
            f"{bound.resolution:g}",
        )
        for bound in BOUNDS.values()
    ]
    heads = (
        "arithmetic",
        "relative error at most",
        "cosine at least",
        "kept tokens in common at least",
        "resolution of a near tie",
    )
    return markdown_table(heads, rows)


def reasons() -> str:
    """Returns why each bound is what it is."""
    return "".join(f"- **{bound.precision}**: {bound.reason}\n" for bound in BOUNDS.values())
