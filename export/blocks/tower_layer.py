"""A layer of a vision tower of CLIP's kind as a static module, and the activations of towers and projectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from export.blocks.attention import Part, attention, heads_first, heads_last
from export.blocks.norms import LayerNorm


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), any shape."""

    slope: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slope", torch.tensor([1.702]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> same shape"""
        return x * torch.sigmoid(x * self.slope)


class TanhGelu(nn.Module):
    """GELU by its approximation with a hyperbolic tangent, any shape: x * sigmoid(2 u), u the tangent's argument.

    Spelled out, because XNNPACK would take torch's own for the exact form. Beyond 10 the sigmoid is 0 or 1 to the last
    bit, and a square would leave float16.
    """

    slope: Tensor
    cubic: Tensor

    def __init__(self) -> None:
        super().__init__()
        slope = 2 * math.sqrt(2 / math.pi)
        self.register_buffer("slope", torch.tensor([slope]), persistent=False)
        self.register_buffer("cubic", torch.tensor([slope * 0.044715]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> same shape"""
        near = x.clamp(-10.0, 10.0)
        return x * torch.sigmoid(near * (near * near * self.cubic + self.slope))


class Gelu(nn.Module):
    """GELU by the error function, any shape; computed in float32, because XNNPACK has no float16 form of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> same shape"""
        return nn.functional.gelu(x.float()).to(x.dtype)


ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGelu,
    "gelu": Gelu,
    "gelu_pytorch_tanh": TanhGelu,
}


class TowerAttention(nn.Module):
    """Bidirectional self-attention over all patches and the class token."""

    scale: Tensor
    each_head: Tensor

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, device="meta")
        self.k_proj = nn.Linear(width, width, device="meta")
        self.v_proj = nn.Linear(width, width, device="meta")
        self.out_proj = nn.Linear(width, width, device="meta")
        self.register_buffer("scale", torch.tensor([(width // heads) ** -0.5]), persistent=False)
        self.register_buffer("each_head", torch.full((1, 1, heads), 1.0 / heads), persistent=False)

    def of_first(self, first: Tensor, keys: Tensor) -> Tensor:
        """What the first token (1, 1, D) gives to each, averaged over heads: keys (1, T, D) -> (1, T)"""
        query = heads_first(self.q_proj(first) * self.scale, self.heads)
        weights = torch.softmax(torch.bmm(query, heads_first(keys, self.heads).permute(0, 2, 1)), dim=-1)
        return torch.bmm(self.each_head, weights.permute(1, 0, 2)).reshape(1, -1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, T, D) -> output (1, T, D), keys (1, T, D) with the heads side by side"""
        keys = self.k_proj(x)
        # Scaling the queries instead of the scores touches T x D numbers instead of heads x T x T.
        query = heads_first(self.q_proj(x) * self.scale, self.heads)
        mixed = attention(query, [Part(heads_first(keys, self.heads), heads_first(self.v_proj(x), self.heads))])
        return self.out_proj(heads_last(mixed)), keys


class TowerMlp(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, *, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner, device="meta")
        self.activation = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(inner, width, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D)"""
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class TowerLayer(nn.Module):
    """One pre-norm transformer layer; `activation` is a key of ACTIVATIONS."""

    def __init__(self, *, width: int, heads: int, inner: int, activation: str, norm_eps: float) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(width, norm_eps)
        self.self_attn = TowerAttention(width=width, heads=heads)
        self.layer_norm2 = LayerNorm(width, norm_eps)
        self.mlp = TowerMlp(width=width, inner=inner, activation=activation)

    def attention_of_first(self, x: Tensor, keys: Tensor) -> Tensor:
        """What the first token gives to each: the layer's input and keys (1, T, D) -> (1, T)"""
        return self.self_attn.of_first(self.layer_norm1(x[:, :1]), keys)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, T, D) -> hidden (1, T, D), keys (1, T, D)"""
        mixed, keys = self.self_attn(self.layer_norm1(x))
        x = x + mixed
        return x + self.mlp(self.layer_norm2(x)), keys
