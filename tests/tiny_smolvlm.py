"""SmolVLM2 in small, for tests: all that the real ones have, at few patches."""

from __future__ import annotations

from export.families.family import ModelEntry
from export.families.smolvlm import SMOLVLM

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
