"""A layer of a vision tower whose patches have rotary positions, looking at all of them or at windows of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.blocks.attention import Part, apart, attention, heads_first, heads_last
from export.blocks.decoder_layer import GatedMlp
from export.blocks.norms import LayerNorm, Norm, RmsNorm
from export.blocks.rope import rotate
from export.blocks.tower_layer import TowerMlp


class RotaryTowerAttention(nn.Module):
    """Bidirectional self-attention with rotary positions; queries, keys and values come from one linear layer."""

    scale: Tensor

    def __init__(self, *, width: int, heads: int, windows: int) -> None:
        """`windows` is how many equal parts of the patches, one behind the other, see nothing but themselves."""
        super().__init__()
        self.width, self.heads, self.windows = width, heads, windows
        self.qkv_proj = nn.Linear(width, 3 * width, device="meta")
        self.out_proj = nn.Linear(width, width, device="meta")
        self.register_buffer("scale", torch.tensor([(width // heads) ** -0.5]), persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(1, T, D), tables (T, d) from `turns` -> output (1, T, D), turned keys (1, T, D), heads side by side"""
        fused, width = self.qkv_proj(x), self.width
        query = rotate(heads_first(fused[:, :, :width] * self.scale, self.heads), cos, sin)
        key = rotate(heads_first(fused[:, :, width : 2 * width], self.heads), cos, sin)
        value = heads_first(fused[:, :, 2 * width :], self.heads)
        mixed = attention(apart(query, self.windows), [Part(apart(key, self.windows), apart(value, self.windows))])
        return self.out_proj(heads_last(mixed.reshape(query.shape))), heads_last(key)


class RotaryTowerLayer(nn.Module):
    """One pre-norm transformer layer; with `gated` its norms are RMS norms and its MLP is a gated one.

    Without, `activation` is a key of ACTIVATIONS for the MLP between two linear layers.
    """

    def __init__(
        self, *, width: int, heads: int, inner: int, activation: str, norm_eps: float, gated: bool, windows: int
    ) -> None:
        super().__init__()
        self.layer_norm1 = tower_norm(width, norm_eps, gated=gated)
        self.self_attn = RotaryTowerAttention(width=width, heads=heads, windows=windows)
        self.layer_norm2 = tower_norm(width, norm_eps, gated=gated)
        self.mlp: nn.Module = (
            GatedMlp(width=width, inner=inner, bias=True)
            if gated
            else TowerMlp(width=width, inner=inner, activation=activation)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(1, T, D), tables (T, d) -> hidden (1, T, D), keys (1, T, D)"""
        mixed, keys = self.self_attn(self.layer_norm1(x), cos, sin)
        x = x + mixed
        return x + self.mlp(self.layer_norm2(x)), keys


def tower_norm(width: int, epsilon: float, *, gated: bool) -> Norm:
    """The norm that such layers have, and what reads them."""
    return RmsNorm(width, epsilon) if gated else LayerNorm(width, epsilon)
