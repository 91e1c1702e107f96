"""The families that can be exported, and the table of models that `--model` can name; free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.families.family import Family, ModelEntry
from export.families.llava.family import LLAVA
from export.families.qwen_vl.family import QWEN2_5_VL, QWEN2_VL

FAMILIES: Mapping[str, Family[Any]] = {
    "llava": LLAVA,
    "qwen2-vl": QWEN2_VL,
    "qwen2.5-vl": QWEN2_5_VL,
}
MODELS: Mapping[str, ModelEntry] = {entry.name: entry for family in FAMILIES.values() for entry in family.models}
