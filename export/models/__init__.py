"""The table of models that `--model` can name."""

from __future__ import annotations

from collections.abc import Mapping

from export.models.llava import LLAVA_7B, LLAVA_13B, ModelEntry
from export.models.pocket import POCKET

MODELS: Mapping[str, ModelEntry] = {entry.name: entry for entry in (LLAVA_7B, LLAVA_13B, POCKET)}
