"""A layer of a vision tower of CLIP's kind as a static module, and the activations of towers and projectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from export.blocks.attention import Part, apart, attention, heads_first, heads_last
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
    """Bidirectional self-attention over all patches and the class token, of each picture by itself."""

    scale: Tensor
    each_head: Tensor

    def __init__(self, *, width: int, heads: int, windows: int = 1) -> None:
        """`windows` is how many pictures there are, one behind the other, which see nothing but themselves."""
        super().__init__()
        self.heads, self.windows = heads, windows
        self.q_proj = nn.Linear(width, width, device="meta")
        self.k_proj = nn.Linear(width, width, device="meta")
        self.v_proj = nn.Linear(width, width, device="meta")
        self.out_proj = nn.Linear(width, width, device="meta")
        self.register_buffer("scale", torch.tensor([(width // heads) ** -0.5]), persistent=False)
        self.register_buffer("each_head", torch.full((1, 1, heads), 1.0 / heads), persistent=False)

    def of_first(self, first: Tensor, keys: Tensor) -> Tensor:
        """What first tokens (1, windows, D) give to each of their own, averaged over heads: keys (1, T, D) -> (1, T)"""
        query = apart(heads_first(self.q_proj(first) * self.scale, self.heads), self.windows)
        weights = torch.softmax(torch.bmm(query, self._apart(keys).permute(0, 2, 1)), dim=-1)
        return torch.bmm(self.each_head, weights.reshape(1, self.heads, -1)).reshape(1, -1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, T, D) -> output (1, T, D), keys (1, T, D) with the heads side by side"""
        keys = self.k_proj(x)
        # Scaling the queries instead of the scores touches T x D numbers instead of heads x T x T.
        query = self._apart(self.q_proj(x) * self.scale)
        mixed = attention(query, [Part(self._apart(keys), self._apart(self.v_proj(x)))])
        if self.windows > 1:
            mixed = mixed.reshape(self.heads, x.shape[1], mixed.shape[2])
        return self.out_proj(heads_last(mixed)), keys

    def _apart(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (heads * windows, T / windows, d)"""
        return apart(heads_first(x, self.heads), self.windows)


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

    def __init__(
        self, *, width: int, heads: int, inner: int, activation: str, norm_eps: float, windows: int = 1
    ) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(width, norm_eps)
        self.self_attn = TowerAttention(width=width, heads=heads, windows=windows)
        self.layer_norm2 = LayerNorm(width, norm_eps)
        self.mlp = TowerMlp(width=width, inner=inner, activation=activation)

    def attention_of_first(self, x: Tensor, keys: Tensor) -> Tensor:
        """What each picture's first token gives to its own: the layer's input and keys (1, T, D) -> (1, T)"""
        windows, width = self.self_attn.windows, x.shape[2]
        first = x[:, :1] if windows == 1 else x.reshape(windows, -1, width)[:, :1].reshape(1, windows, width)
        return self.self_attn.of_first(self.layer_norm1(first), keys)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, T, D) -> hidden (1, T, D), keys (1, T, D)"""
        mixed, keys = self.self_attn(self.layer_norm1(x))
        x = x + mixed
        return x + self.mlp(self.layer_norm2(x)), keys
