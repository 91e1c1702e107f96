"""The config files of a LLaVA-1.5 folder, set to the number of image tokens that a pruned vision graph hands on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.families.llava.config import LlavaGeometry
from export.families.llava.preprocessor import read_preprocessor
from export.settings import read_object


def hub_files(
    folder: Path | None, config: Mapping[str, Any], geometry: LlavaGeometry, *, image_token: str, keep: int
) -> dict[str, dict[str, Any]]:
    """config.json, preprocessor_config.json and processor_config.json by name.

    LlavaProcessor writes (pixels / patch_size)^2 + `num_additional_image_tokens` image tokens, and transformers.js
    takes the class token off neither here nor there, so that `keep - N` makes `keep`.
    """
    processor = None if folder is None else read_object(folder / "processor_config.json")
    return {
        "config.json": {
            **config,
            "image_token_index": geometry.image_token_id,
            "image_seq_length": keep,
            "text_config": {
                **(config.get("text_config") or {}),
                "model_type": "llama",
                "num_hidden_layers": geometry.text.layers,
            },
        },
        "preprocessor_config.json": {
            **read_preprocessor(folder, geometry.vision.image_size),
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
        },
        "processor_config.json": {
            **(processor or {}),
            "image_token": image_token,
            "num_additional_image_tokens": keep - geometry.image_tokens,
            "patch_size": geometry.vision.patch_size,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "full",
        },
    }
