"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in small, for tests: all that the real ones have, at a wide image of few tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.families.family import ModelEntry
from export.families.qwen_vl.config import Version
from export.families.qwen_vl.family import QWEN2_5_VL, QWEN2_VL, QWEN3_VL, QwenVl

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
    "qwen3_vl": {
        "depth": 4,
        "hidden_size": 32,
        "out_hidden_size": 48,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 40,
        "patch_size": 16,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0, 2, 3],
    },
}
_ROPE: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
_TEXTS: Mapping[Version, Mapping[str, Any]] = {
    "qwen2_vl": {"rope_parameters": {**_ROPE, "mrope_section": [1, 2, 3]}},
    "qwen2_5_vl": {"rope_parameters": {**_ROPE, "mrope_section": [1, 2, 3]}},
    "qwen3_vl": {
        "num_hidden_layers": 5,
        "head_dim": 16,
        "rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    },
}


def _config(version: Version) -> Mapping[str, Any]:
    return {
        "model_type": version,
        "image_token_id": 94,
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
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "vocab_size": 96,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **_TEXTS[version],
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
TINY_QWEN3_VL = _entry(QWEN3_VL, (128, 160))
TINY_QWENS = (TINY_QWEN2_VL, TINY_QWEN2_5_VL, TINY_QWEN3_VL)


# What a published folder holds: one token a byte, the special ones behind them, and a template that pastes.
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
_SYSTEM = "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
TEMPLATE = (
    f"{{% for message in messages %}}{_SYSTEM}<|im_start|>{{{{ message['role'] }}}}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Photos down to the size of the tests' stay as they are.
_PROCESSOR_2: Mapping[str, Any] = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136}
PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "qwen2_vl": _PROCESSOR_2,
    "qwen2_5_vl": _PROCESSOR_2,
    "qwen3_vl": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": 4096, "longest_edge": 16777216},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}


def special(token: str) -> int:
    """The id of one of SPECIALS in the tokenizer of `write_checkpoint`."""
    return 256 + SPECIALS.index(token)


def with_tokenizer(entry: ModelEntry) -> ModelEntry:
    """The entry with a vocabulary for the tokenizer of `write_checkpoint`, and with tied embeddings."""
    ids = {"bos_token_id": special("<|endoftext|>"), "eos_token_id": special("<|im_end|>")}
    config = {
        **entry.config,
        "image_token_id": special("<|image_pad|>"),
        "video_token_id": 264,
        "vision_start_token_id": special("<|vision_start|>"),
        "vision_end_token_id": special("<|vision_end|>"),
        "tie_word_embeddings": True,
        "text_config": {**entry.config["text_config"], "vocab_size": 272, **ids},
    }
    return replace(entry, name=f"{entry.name}-tied", config=config)


def write_checkpoint(
    folder: Path,
    entry: ModelEntry,
    preprocessor: Mapping[str, Any] | None = None,
    *,
    specials: Sequence[str] = SPECIALS,
    tokens: Mapping[str, str] | None = None,
    template: str | None = None,
) -> Any:
    """Writes a folder of `with_tokenizer(...)` as transformers does, weights from a seed; returns its whole model.

    `preprocessor` are its image settings; None those of Qwen2-VL. `tokens` are the special ones by their roles.
    """
    import tokenizers
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    make: Any = AutoModelForImageTextToText.from_config
    model = make(AutoConfig.for_model(**dict(entry.config)), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # those that begin as zeros and ones would hide a name that is mixed up
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in specials])
    made.save(str(folder / "tokenizer.json"))
    written = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            **(tokens or {}),
        },
        "preprocessor_config.json": preprocessor or PROCESSORS[entry.family.model_type],
    }
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    # Qwen3-VL has no system prompt of its own.
    if template is None:
        template = TEMPLATE.replace(_SYSTEM, "") if entry.family.model_type == "qwen3_vl" else TEMPLATE
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return model


def as_published(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as the hub has it: the decoder's keys at the top, the sections of its rotary embedding as mrope.

    Qwen3-VL's keep the decoder in a section, and call the tower's type as the whole model's.
    """
    if config["model_type"] == "qwen3_vl":
        decoder = dict(config["text_config"])
        sections = dict(decoder.pop("rope_parameters"))
        decoder |= {"rope_theta": sections.pop("rope_theta"), "rope_scaling": sections}
        return {
            **config,
            "text_config": decoder,
            "vision_config": {**config["vision_config"], "model_type": "qwen3_vl"},
        }
    flat = {key: value for key, value in config.items() if key != "text_config"}
    text = {key: value for key, value in config["text_config"].items() if key != "model_type"}
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    return {**text, **flat, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
