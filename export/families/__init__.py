"""The families that can be exported, and the table of models that `--model` can name; free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.families.family import Family, Geometry, ModelEntry
from export.families.llava.family import LLAVA
from export.families.llava_tiles.family import LLAVA_NEXT, LLAVA_ONEVISION
from export.families.qwen_vl.family import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from export.families.smolvlm import SMOLVLM

FAMILIES: Mapping[str, Family[Any]] = {
    "llava": LLAVA,
    "qwen2-vl": QWEN2_VL,
    "qwen2.5-vl": QWEN2_5_VL,
    "qwen3-vl": QWEN3_VL,
    "llava-onevision": LLAVA_ONEVISION,
    "llava-next": LLAVA_NEXT,
    "smolvlm": SMOLVLM,
}
_NO_CACHE = "whose state is no cache of keys and values, as the graphs hand it on"
NOT_YET: Mapping[str, str] = {
    "qwen3_vl_moe": "a router picks a few of many MLPs for each token, and a layer of the graphs has one",
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), f"three of four decoder layers are linear attention, {_NO_CACHE}"),
    **dict.fromkeys(
        ("gemma4", "gemma4_unified", "gemma3n"),
        "decoder layers see windows of the text, share keys and values, and have embeddings of their own for a token",
    ),
    "lfm2_vl": f"most decoder layers are convolutions over the last tokens, {_NO_CACHE}",
}
"""What stands in the way of families that people ask for, by what a config.json calls them."""
MODELS: Mapping[str, ModelEntry] = {entry.name: entry for family in FAMILIES.values() for entry in family.models}


def family_of(model_type: object) -> Family[Any] | None:
    """The family whose config.json calls itself so; None for one that is not known."""
    return next((family for family in FAMILIES.values() if family.model_type == model_type), None)


def known_model(family: Family[Any], geometry: Geometry) -> ModelEntry | None:
    """The family's first model in the table that has these sizes; None where none has."""
    return next((entry for entry in family.models if entry.geometry.numbers() == geometry.numbers()), None)
