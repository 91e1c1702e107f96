"""LLaMA's decoder layer as a static module: rotary tables and masks are inputs, keys and values go in and out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from export.graphs.attention import Part, attention, heads_first, heads_last
from export.graphs.norms import RmsNorm
from export.models.llava import Rope, TextGeometry

# Far below any score, yet with room to add one to it in float16.
HIDDEN = -3e4


class LayerOutput(NamedTuple):
    """What one decoder layer leaves behind; keys are after the rotary embedding."""

    hidden: Tensor  # (1, T, D)
    key: Tensor  # (Hkv, T, d), of the new tokens
    value: Tensor  # (Hkv, T, d)
    all_keys: Tensor  # (Hkv, S, d), past and new
    all_values: Tensor  # (Hkv, S, d)


def rope_tables(text: TextGeometry, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, head_dim) float32 for absolute positions.

    The first half of each row of sines is negated, so that rotating needs no negation: see `LlamaLayer.rotate`.
    """
    steps = torch.tensor(list(positions), dtype=torch.float32)
    angles = steps[:, None] * _inverse_frequencies(text.rope, text.head_dim)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def _inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """(head_dim / 2,) float32, in the order of operations that transformers uses, hence equal to the last bit."""
    base = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind == "default":
        return base
    if rope.kind == "linear":
        return base / rope.factor
    # llama3: long waves are stretched by `factor`, short ones stay, those between are blended.
    wavelength = 2 * math.pi / base
    longest = rope.original_max_positions / rope.low_freq_factor
    shortest = rope.original_max_positions / rope.high_freq_factor
    blend = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - blend) * base / rope.factor + blend * base
    stretched = torch.where(wavelength > longest, base / rope.factor, base)
    return torch.where((wavelength <= longest) & (wavelength >= shortest), between, stretched)


def causal_mask(tokens: int, *, past: int = 0) -> Tensor:
    """(tokens, past + tokens) float32: 0 where a token may look, far below 0 ahead of it; all of the past is open."""
    ahead = torch.ones(tokens, tokens).triu(diagonal=1) * HIDDEN
    return torch.cat([torch.zeros(tokens, past), ahead], dim=1)


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions; fewer key heads than query heads are allowed."""

    scale: Tensor

    def __init__(self, text: TextGeometry) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = text.heads, text.kv_heads, text.head_dim
        queries, keys, bias = text.heads * text.head_dim, text.kv_heads * text.head_dim, text.attention_bias
        self.q_proj = nn.Linear(text.hidden, queries, bias=bias, device="meta")
        self.k_proj = nn.Linear(text.hidden, keys, bias=bias, device="meta")
        self.v_proj = nn.Linear(text.hidden, keys, bias=bias, device="meta")
        self.o_proj = nn.Linear(queries, text.hidden, bias=bias, device="meta")
        self.register_buffer("scale", torch.tensor([text.head_dim**-0.5]), persistent=False)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(H, T, d) with tables (T, d) from `rope_tables` -> (H, T, d)"""
        half = self.head_dim // 2
        swapped = torch.cat([x[:, :, half:], x[:, :, :half]], dim=2)
        return x * cos + swapped * sin

    def key_value(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys after the rotary embedding, and values, of normed x (1, T, D): (Hkv, T, d) each."""
        key = self.rotate(heads_first(self.k_proj(x), self.kv_heads), cos, sin)
        return key, heads_first(self.v_proj(x), self.kv_heads)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        past_key: Tensor | None,
        past_value: Tensor | None,
        cache: Part | None,
    ) -> LayerOutput:
        """As `LlamaLayer`, with the attention's output as `hidden`."""
        query = self.rotate(heads_first(self.q_proj(x) * self.scale, self.heads), cos, sin)
        key, value = self.key_value(x, cos, sin)
        keys = key if past_key is None else torch.cat([past_key, key], dim=1)
        values = value if past_value is None else torch.cat([past_value, value], dim=1)
        new = Part(keys, values, mask)
        mixed = attention(query, [new] if cache is None else [cache, new])
        return LayerOutput(self.o_proj(heads_last(mixed)), key, value, keys, values)


class LlamaMlp(nn.Module):
    """The gated MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, text: TextGeometry) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(text.hidden, text.mlp, bias=text.mlp_bias, device="meta")
        self.up_proj = nn.Linear(text.hidden, text.mlp, bias=text.mlp_bias, device="meta")
        self.down_proj = nn.Linear(text.mlp, text.hidden, bias=text.mlp_bias, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D)"""
        gate = self.gate_proj(x)
        out: Tensor = self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))
        return out


class LlamaLayer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, text: TextGeometry) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(text.hidden, text.norm_eps)
        self.self_attn = LlamaAttention(text)
        self.post_attention_layernorm = RmsNorm(text.hidden, text.norm_eps)
        self.mlp = LlamaMlp(text)

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        past_key: Tensor | None = None,
        past_value: Tensor | None = None,
        cache: Part | None = None,
    ) -> LayerOutput:
        """hidden (1, T, D), tables (T, d), mask (T, S), past (Hkv, S - T, d) -> LayerOutput

        `past` stands before the new keys and becomes one tensor with them; `cache` is attended as well, where it lies.
        """
        normed = self.input_layernorm(hidden)
        out: LayerOutput = self.self_attn(normed, cos, sin, mask, past_key, past_value, cache)
        hidden = hidden + out.hidden
        return out._replace(hidden=hidden + self.mlp(self.post_attention_layernorm(hidden)))

    def key_value(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of hidden (1, T, D) alone, all that a last layer is asked for when nothing follows it."""
        return self.self_attn.key_value(self.input_layernorm(hidden), cos, sin)
