"""The families that can be exported, and the table of models that `--model` can name; free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.families.family import Family, Geometry, ModelEntry
from export.families.llava.family import LLAVA
from export.families.llava_tiles.family import LLAVA_NEXT, LLAVA_ONEVISION
from export.families.qwen_vl.family import QWEN2_5_VL, QWEN2_VL

FAMILIES: Mapping[str, Family[Any]] = {
    "llava": LLAVA,
    "qwen2-vl": QWEN2_VL,
    "qwen2.5-vl": QWEN2_5_VL,
    "llava-onevision": LLAVA_ONEVISION,
    "llava-next": LLAVA_NEXT,
}
MODELS: Mapping[str, ModelEntry] = {entry.name: entry for family in FAMILIES.values() for entry in family.models}


def family_of(model_type: object) -> Family[Any] | None:
    """The family whose config.json calls itself so; None for one that is not known."""
    return next((family for family in FAMILIES.values() if family.model_type == model_type), None)


def known_model(family: Family[Any], geometry: Geometry) -> ModelEntry | None:
    """The family's first model in the table that has these sizes; None where none has."""
    return next((entry for entry in family.models if entry.geometry.numbers() == geometry.numbers()), None)
