"""CLIP's vision tower and LLaVA's projector as static modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from export.graphs.attention import Part, attention, heads_first, heads_last
from export.graphs.norms import LayerNorm
from export.models.llava import LlavaGeometry, VisionGeometry


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), any shape."""

    slope: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slope", torch.tensor([1.702]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> same shape"""
        return x * torch.sigmoid(x * self.slope)


class Gelu(nn.Module):
    """GELU by the error function, any shape; computed in float32, because XNNPACK has no float16 form of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> same shape"""
        return nn.functional.gelu(x.float()).to(x.dtype)


_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {"quick_gelu": QuickGelu, "gelu": Gelu}


class ClipAttention(nn.Module):
    """Bidirectional self-attention over all patches and the class token."""

    scale: Tensor

    def __init__(self, vision: VisionGeometry) -> None:
        super().__init__()
        self.heads = vision.heads
        width = vision.hidden
        self.q_proj = nn.Linear(width, width, device="meta")
        self.k_proj = nn.Linear(width, width, device="meta")
        self.v_proj = nn.Linear(width, width, device="meta")
        self.out_proj = nn.Linear(width, width, device="meta")
        self.register_buffer("scale", torch.tensor([(width // vision.heads) ** -0.5]), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, T, D) -> output (1, T, D), keys (1, T, D) with the heads side by side"""
        keys = self.k_proj(x)
        # Scaling the queries instead of the scores touches T x D numbers instead of heads x T x T.
        query = heads_first(self.q_proj(x) * self.scale, self.heads)
        mixed = attention(query, [Part(heads_first(keys, self.heads), heads_first(self.v_proj(x), self.heads))])
        return self.out_proj(heads_last(mixed)), keys


class ClipMlp(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, vision: VisionGeometry) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision.hidden, vision.mlp, device="meta")
        self.activation = _ACTIVATIONS[vision.activation]()
        self.fc2 = nn.Linear(vision.mlp, vision.hidden, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D)"""
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class ClipLayer(nn.Module):
    """One pre-norm transformer layer of the tower."""

    def __init__(self, vision: VisionGeometry) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(vision.hidden, vision.norm_eps)
        self.self_attn = ClipAttention(vision)
        self.layer_norm2 = LayerNorm(vision.hidden, vision.norm_eps)
        self.mlp = ClipMlp(vision)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, T, D) -> hidden (1, T, D), keys (1, T, D)"""
        mixed, keys = self.self_attn(self.layer_norm1(x))
        x = x + mixed
        return x + self.mlp(self.layer_norm2(x)), keys


class ClipEmbeddings(nn.Module):
    """Patches through a convolution that does not overlap, the class token in front, positions added."""

    def __init__(self, vision: VisionGeometry) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            vision.channels, vision.hidden, vision.patch_size, stride=vision.patch_size, bias=False, device="meta"
        )
        self.class_embedding = nn.Parameter(torch.empty(vision.hidden, device="meta"), requires_grad=False)
        self.position_embedding = nn.Embedding(vision.tokens + 1, vision.hidden, device="meta")

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(1, 3, H, W) -> (1, 1 + N, D)"""
        patches = self.patch_embedding(pixel_values)
        _, width, rows, columns = patches.shape
        patches = patches.reshape(1, width, rows * columns).permute(0, 2, 1)
        tokens = torch.cat([self.class_embedding.reshape(1, 1, width), patches], dim=1)
        return tokens + self.position_embedding.weight


class ClipTower(nn.Module):
    """The layers of the tower up to the one whose output LLaVA projects."""

    def __init__(self, geometry: LlavaGeometry) -> None:
        super().__init__()
        vision = geometry.vision
        self.embeddings = ClipEmbeddings(vision)
        # The missing e is in the published tensor names.
        self.pre_layrnorm = LayerNorm(vision.hidden, vision.norm_eps)
        self.layers = nn.ModuleList(ClipLayer(vision) for _ in range(geometry.tower_layers))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 3, H, W) -> features (1, N, D) and keys (1, N, D) of the last layer run, both without the class token"""
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        keys = hidden
        for layer in self.layers:
            hidden, keys = layer(hidden)
        return hidden[:, 1:], keys[:, 1:]


class Projector(nn.Module):
    """From the tower's width to the decoder's."""

    def __init__(self, geometry: LlavaGeometry) -> None:
        super().__init__()
        width, out, bias = geometry.vision.hidden, geometry.text.hidden, geometry.projector_bias
        self.linear_1 = nn.Linear(width, out, bias=bias, device="meta")
        self.activation = _ACTIVATIONS[geometry.projector_activation]()
        self.linear_2 = nn.Linear(out, out, bias=bias, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """(1, N, Dv) -> (1, N, D)"""
        out: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return out
