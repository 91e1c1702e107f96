"""A LLaVA small enough for a unit test, with every optional feature switched on, as an entry and as a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from export.checkpoints import RandomCheckpoint
from export.families.family import ModelEntry
from export.families.llava.family import LLAVA
from export.families.llava.tensors import spellings

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 5,
    "image_seq_length": 16,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 58,  # two pixels more than four patches: the remainder is never seen
        "patch_size": 14,
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "vocab_size": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_theta": 5000.0,
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}

TINY = ModelEntry(name="tiny", family=LLAVA, summary="for tests", hub_id=None, config=CONFIG, prefix_tokens=7)


def tiny_tensors(*, older_layout: bool = False) -> dict[str, torch.Tensor]:
    """Seeded weights under Hugging Face's names, of the newer or the older layout."""
    source = RandomCheckpoint(TINY, seed=1)
    return {stored_name(name, older_layout=older_layout): source.tensor(name).float() for name in source.names()}


def stored_name(name: str, *, older_layout: bool) -> str:
    """A canonical name as one of the two published layouts spells it."""
    name = spellings(name)[0]
    if not older_layout:
        return name if name.startswith("lm_head.") else f"model.{name}"
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def write_tiny(
    folder: Path,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] = CONFIG,
    shards: int = 1,
    older_layout: bool = False,
) -> Path:
    """Writes the model into `folder` as one file or as shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = tiny_tensors(older_layout=older_layout) if tensors is None else tensors
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def in_fp32(graph: str) -> tuple[str, ...]:
    """What a manifest says of a graph that computes in float32 and is not quantised."""
    return ("fp32",)
