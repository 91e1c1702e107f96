"""CLIP's vision tower with LLaVA's projector behind it, as one static module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.blocks.norms import LayerNorm
from export.blocks.projector import Projector
from export.blocks.tower_layer import TowerLayer
from export.families.family import Seen
from export.families.llava.config import LlavaGeometry, VisionGeometry


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
    """The layers of the tower up to the one whose output is projected, and the projector."""

    def __init__(self, geometry: LlavaGeometry) -> None:
        super().__init__()
        vision = geometry.vision
        self.embeddings = ClipEmbeddings(vision)
        # The missing e is in the published tensor names.
        self.pre_layrnorm = LayerNorm(vision.hidden, vision.norm_eps)
        self.layers = nn.ModuleList(
            TowerLayer(
                width=vision.hidden,
                heads=vision.heads,
                inner=vision.mlp,
                activation=vision.activation,
                norm_eps=vision.norm_eps,
            )
            for _ in range(geometry.tower_layers)
        )
        self.projector = Projector(
            width=vision.hidden,
            out=geometry.text.hidden,
            activation=geometry.projector_activation,
            bias=geometry.projector_bias,
        )

    def forward(self, pixel_values: Tensor, *, attention: bool = False) -> Seen:
        """(1, 3, H, W) -> features (1, N, D) and keys (1, N, Dv) of the last layer run, both without the class token.

        With `attention` also what the class token gives to each in that layer.
        """
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        entered, keys = hidden, hidden
        for layer in self.layers:
            entered = hidden
            hidden, keys = layer(entered)
        given = None
        if attention:
            last = self.layers[-1]
            assert isinstance(last, TowerLayer)
            given = last.attention_of_first(entered, keys)[:, 1:]
        return Seen(self.projector(hidden[:, 1:]), keys[:, 1:], given)
