"""The rules by which `pruneport explain` judges a Core ML package."""

from __future__ import annotations

from docs.tables.markdown import table as markdown_table
from runtime.explain import rules


def table() -> str:
    """Returns what likely leaves the Neural Engine or slows it, what to do, and who says so."""
    rows = [
        (f"`{rule.id}`", rule.effect, rule.likely, rule.rewrite, f"<{rule.source}>") for rule in rules().neural_engine
    ]
    return markdown_table(("rule", "effect", "likely", "rewrite", "who says so"), rows)
