"""The pocket model before its training: transformers' LLaVA of the table's sizes, with weights from a seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VISION: dict[str, Any] = {
    "hidden_size": 192,
    "image_size": 336,
    "intermediate_size": 768,
    "num_attention_heads": 6,
    "num_hidden_layers": 7,
    "patch_size": 14,
}
TEXT: dict[str, Any] = {
    "hidden_size": 288,
    "head_dim": 48,
    "intermediate_size": 640,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "num_hidden_layers": 6,
    "vocab_size": 640,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def pocket_model() -> Any:
    """Builds the model untrained; filters of the first layer see low spatial frequencies, which saves a plateau."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=3,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config._attn_implementation = "sdpa"
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "position" not in name:
            nn.init.normal_(parameter, std=0.7 * parameter.shape[1] ** -0.5)
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
            nn.init.normal_(parameter, std=0.2 * parameter.shape[1] ** -0.5)
        if "position_embedding" in name:
            nn.init.normal_(parameter, std=0.05)
        if "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.3)
        if "patch_embedding" in name:
            parameter.data.copy_(_filters(*parameter.shape))
    return model


def _filters(width: int, channels: int, side: int, _: int) -> torch.Tensor:
    """Mixtures of cosines of up to six half waves across a patch, more of the low ones, in all colours."""
    at = (torch.arange(side) + 0.5) * torch.pi / side
    waves = torch.stack([torch.outer(torch.cos(u * at), torch.cos(v * at)) for u in range(7) for v in range(7 - u)])
    waves = waves / waves.flatten(1).norm(dim=1)[:, None, None]
    mix = torch.randn(width, channels, len(waves)) * 0.25
    return torch.einsum("wck,kab->wcab", mix, waves)
