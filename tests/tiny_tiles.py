"""LLaVA-NeXT and LLaVA-OneVision in small, for tests: all that the real ones have, at few pixels a tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from export.families.family import ModelEntry
from export.families.llava_tiles.family import LLAVA_NEXT, LLAVA_ONEVISION, LlavaTiles
from tests.tiny_qwen import special

TILE = 58  # two pixels more than four patches: the remainder is never seen

_VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": 14,
}
_TEXT: Mapping[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PINPOINTS = [[TILE * rows, TILE * columns] for rows in range(1, 4) for columns in range(1, 4)]


def _entry(family: LlavaTiles, text: Mapping[str, Any], vision: Mapping[str, Any], **config: Any) -> ModelEntry:
    return ModelEntry(
        name=f"tiny-{family.name}",
        family=family,
        summary="for tests",
        hub_id=None,
        config={
            "model_type": family.model_type,
            "image_token_index": 90,
            "image_grid_pinpoints": _PINPOINTS,
            "vision_config": {**_VISION, **vision},
            "text_config": {**_TEXT, **text},
            **config,
        },
        prefix_tokens=5,
        precision="fp32",
        quant_text="none",
    )


TINY_NEXT = _entry(
    LLAVA_NEXT,
    {"model_type": "mistral", "sliding_window": None},
    {"model_type": "clip_vision_model"},
    image_seq_length=16,
    vision_feature_layer=-2,
)
# Of more than two tiles tokens are averaged.
TINY_ONEVISION = _entry(
    LLAVA_ONEVISION,
    {"model_type": "qwen2"},
    {"model_type": "siglip_vision_model", "vision_use_head": False},
    video_token_index=91,
    vision_aspect_ratio="anyres_max_2",
)


def in_tiles(entry: ModelEntry, image_size: tuple[int, int]) -> ModelEntry:
    """The entry for photos of (height, width) pixels in tiles."""
    height, width = image_size
    return replace(entry, name=f"{entry.name}-{height}x{width}", family=entry.family.resized(image_size))


def with_tokenizer(entry: ModelEntry) -> ModelEntry:
    """The entry with a vocabulary for the tokenizer of `tests.tiny_qwen.write_checkpoint`, and with tied embeddings."""
    ids = {"bos_token_id": special("<|endoftext|>"), "eos_token_id": special("<|im_end|>")}
    config = {
        **entry.config,
        "image_token_index": special("<|image_pad|>"),
        "tie_word_embeddings": True,
        "text_config": {**entry.config["text_config"], "vocab_size": 272, **ids},
    }
    return replace(entry, name=f"{entry.name}-tied", config=config)


# What a published folder says of photos, but for the sizes.
PREPROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "llava-next": {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": TILE},
        "crop_size": {"height": TILE, "width": TILE},
        "image_grid_pinpoints": _PINPOINTS,
    },
    "llava-onevision": {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": TILE, "width": TILE},
        "image_grid_pinpoints": _PINPOINTS,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.3, 0.2, 0.25],
    },
}

# Of another shape than any number of tiles, so that padding is left out; the second one's tokens are averaged.
TILED_NEXT = in_tiles(TINY_NEXT, (58, 90))
TILED_ONEVISION = in_tiles(TINY_ONEVISION, (100, 160))
