"""Qwen2-VL and Qwen2.5-VL in small, for tests: all that the real ones have, at a wide image of few tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from export.families.family import ModelEntry
from export.families.qwen_vl.config import Version
from export.families.qwen_vl.family import QWEN2_5_VL, QWEN2_VL, QwenVl

_TOWERS: Mapping[Version, Mapping[str, Any]] = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 48, "hidden_act": "quick_gelu", "mlp_ratio": 2},
    "qwen2_5_vl": {
        "hidden_size": 32,
        "out_hidden_size": 48,
        "hidden_act": "silu",
        "intermediate_size": 40,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
}


def _config(version: Version) -> Mapping[str, Any]:
    return {
        "model_type": version,
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": f"{version}_vision",
            "depth": 3,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **_TOWERS[version],
        },
        "text_config": {
            "model_type": f"{version}_text",
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "vocab_size": 96,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 2, 3]},
        },
    }


def _entry(family: QwenVl, image_size: tuple[int, int]) -> ModelEntry:
    return ModelEntry(
        name=f"tiny-{family.name}",
        family=replace(family, image_size=image_size),
        summary="for tests",
        hub_id=None,
        config=_config(family.version),
        prefix_tokens=5,
        precision="fp32",
        quant_text="none",
    )


TINY_QWEN2_VL = _entry(QWEN2_VL, (112, 140))
TINY_QWEN2_5_VL = _entry(QWEN2_5_VL, (112, 168))
