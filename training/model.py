"""The pocket model before its training: transformers' LLaVA of the table's sizes, with weights from a seed."""

from __future__ import annotations

import math
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
    """Builds the model untrained; what its first layer sees, and where a patch stands, are waves from the start.

    Filters of low spatial frequencies save a plateau. Places that start as noise are drowned by what patches show: the
    tower then never learns which patches are neighbours, and no question of where is answered.
    """
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
            parameter.data.copy_(_places(*parameter.shape))
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


def _places(count: int, width: int, waves: int = 8) -> torch.Tensor:
    """Cosines of up to `waves` half waves down and across, each in its own direction; the class token has 0."""
    side = math.isqrt(count - 1)
    at = (torch.arange(side) + 0.5) * torch.pi / side
    wave = torch.stack([torch.cos(k * at) for k in range(1, waves + 1)], -1)
    both = torch.cat([wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)], -1).flatten(0, 1)
    directions = nn.init.orthogonal_(torch.empty(2 * waves, width))
    return torch.cat([torch.zeros(1, width), 4.0 * both @ directions])
