"""A decoder layer of LLaMA's kind: rotary tables and masks are inputs, keys and values go in and out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from export.blocks.attention import Part, attention, heads_first, heads_last
from export.blocks.geometry import TextGeometry
from export.blocks.norms import RmsNorm
from export.blocks.rope import rotate


class LayerOutput(NamedTuple):
    """What one decoder layer leaves behind; keys are after the rotary embedding."""

    hidden: Tensor  # (1, T, D)
    key: Tensor  # (Hkv, T, d), of the new tokens
    value: Tensor  # (Hkv, T, d)
    all_keys: Tensor  # (Hkv, S, d), past and new
    all_values: Tensor  # (Hkv, S, d)


class DecoderAttention(nn.Module):
    """Causal self-attention with rotary positions; fewer key heads than query heads are allowed.

    With `TextGeometry.qk_norm` each head of queries and keys is normed by itself, all by the same weights.
    """

    scale: Tensor

    def __init__(self, text: TextGeometry) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = text.heads, text.kv_heads, text.head_dim
        queries, keys, bias = text.heads * text.head_dim, text.kv_heads * text.head_dim, text.qkv_bias
        self.q_proj = nn.Linear(text.hidden, queries, bias=bias, device="meta")
        self.k_proj = nn.Linear(text.hidden, keys, bias=bias, device="meta")
        self.v_proj = nn.Linear(text.hidden, keys, bias=bias, device="meta")
        self.o_proj = nn.Linear(queries, text.hidden, bias=text.out_bias, device="meta")
        self.register_buffer("scale", torch.tensor([text.head_dim**-0.5]), persistent=False)
        self.q_norm = RmsNorm(text.head_dim, text.norm_eps) if text.qk_norm else None
        self.k_norm = RmsNorm(text.head_dim, text.norm_eps) if text.qk_norm else None

    def queries(self, x: Tensor) -> Tensor:
        """Queries in front of scale and rotary embedding, of normed x (1, T, D): (1, T, H * d)"""
        return self._each_head(self.q_norm, self.q_proj(x))

    def keys(self, x: Tensor) -> Tensor:
        """Keys in front of the rotary embedding, of normed x (1, T, D): (1, T, Hkv * d)"""
        return self._each_head(self.k_norm, self.k_proj(x))

    def _each_head(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        """(1, T, heads * d) -> same"""
        if norm is None:
            return x
        heads: Tensor = norm(x.view(1, -1, self.head_dim))
        return heads.view(1, -1, x.shape[2])

    def key_value(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys after the rotary embedding, and values, of normed x (1, T, D): (Hkv, T, d) each."""
        key = rotate(heads_first(self.keys(x), self.kv_heads), cos, sin)
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
        """As `DecoderLayer`, with the attention's output as `hidden`."""
        query = rotate(heads_first(self.queries(x) * self.scale, self.heads), cos, sin)
        key, value = self.key_value(x, cos, sin)
        keys = key if past_key is None else torch.cat([past_key, key], dim=1)
        values = value if past_value is None else torch.cat([past_value, value], dim=1)
        new = Part(keys, values, mask)
        mixed = attention(query, [new] if cache is None else [cache, new])
        return LayerOutput(self.o_proj(heads_last(mixed)), key, value, keys, values)


class GatedMlp(nn.Module):
    """The gated MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, *, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias, device="meta")
        self.up_proj = nn.Linear(width, inner, bias=bias, device="meta")
        self.down_proj = nn.Linear(inner, width, bias=bias, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D)"""
        gate = self.gate_proj(x)
        out: Tensor = self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, text: TextGeometry) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(text.hidden, text.norm_eps)
        self.self_attn = DecoderAttention(text)
        self.post_attention_layernorm = RmsNorm(text.hidden, text.norm_eps)
        self.mlp = GatedMlp(width=text.hidden, inner=text.mlp, bias=text.mlp_bias)

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
