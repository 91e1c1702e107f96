"""The families that can be exported, and the table of models that `--model` can name; free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.families.family import Family, ModelEntry
from export.families.llava.family import LLAVA

FAMILIES: Mapping[str, Family[Any]] = {
    "llava": LLAVA,
}
MODELS: Mapping[str, ModelEntry] = {entry.name: entry for family in FAMILIES.values() for entry in family.models}
