"""A small model of a test, exported from its folder as a user does it."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import export.families
from export import pipeline
from export.families.family import ModelEntry
from export.pipeline import Made
from export.progress import Progress
from export.request import Request, plan


def export_small(entry: ModelEntry, folder: Path, out_dir: Path, *, backend: str, keep: str) -> Made:
    """Exports the checkpoint in `folder` under the entry's name; the bundle has passed its check."""
    with patch.object(export.families, "MODELS", {entry.name: entry}):
        request = Request(
            model=entry.name,
            keep=keep,
            target="android",
            backend=backend,
            weights=str(folder),
            text_tokens="192",
            output_dir=str(out_dir),
        )
        made = pipeline.export(plan(request), progress=Progress(stages=7, quiet=True), version="0")
    assert made.verdict.outcome == "passed", [step for step in made.verdict.steps if step.status != "passed"]
    return made
