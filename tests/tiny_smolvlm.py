"""SmolVLM2 in small, for tests: all that the real ones have, at few patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.families.family import ModelEntry
from export.families.smolvlm import SMOLVLM
from tests.tiny_qwen import write_checkpoint

EDGE = 96  # 12 x 12 patches, 6 x 6 image tokens

TINY_SMOLVLM = ModelEntry(
    name="tiny-smolvlm",
    family=SMOLVLM,
    summary="for tests",
    hub_id=None,
    config={
        "model_type": "smolvlm",
        "image_token_id": 90,
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": EDGE,
            "patch_size": 8,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "vocab_size": 96,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    },
    prefix_tokens=5,
    precision="fp32",
    quant_text="none",
)

# What a published folder holds, of tokens and of image settings.
_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
)
PREPROCESSOR: Mapping[str, Any] = {
    "image_processor_type": "SmolVLMImageProcessor",
    "do_image_splitting": True,
    "do_pad": True,
    "max_image_size": {"longest_edge": EDGE},
    "size": {"longest_edge": 4 * EDGE},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 1,
}


def special(token: str) -> int:
    """The id of a special token in the tokenizer of `write_folder`."""
    return 256 + _SPECIALS.index(token)


def with_tokenizer(entry: ModelEntry) -> ModelEntry:
    """The entry with a vocabulary for the tokenizer of `write_folder`."""
    ids = {"bos_token_id": special("<|im_start|>"), "eos_token_id": special("<end_of_utterance>")}
    text = {**entry.config["text_config"], "vocab_size": 272, **ids}
    return replace(entry, config={**entry.config, "image_token_id": special("<image>"), "text_config": text})


def write_folder(folder: Path, entry: ModelEntry) -> Any:
    """Writes a folder of `with_tokenizer(...)` with the published chat template; returns transformers' whole model."""
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    return write_checkpoint(
        folder,
        entry,
        PREPROCESSOR,
        specials=_SPECIALS,
        tokens={"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>"},
        template=DEFAULT_CHAT_TEMPLATE,
    )
