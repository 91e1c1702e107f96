"""CLIP's or SigLIP's vision tower with a projector behind it, as one static module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.blocks.attention import blocks
from export.blocks.norms import LayerNorm
from export.blocks.projector import Projector
from export.blocks.tower_layer import TowerLayer
from export.families.family import Seen
from export.families.llava.config import LlavaGeometry, VisionGeometry


class PatchEmbeddings(nn.Module):
    """Patches through a convolution that does not overlap, positions added; CLIP's have the class token in front."""

    def __init__(self, vision: VisionGeometry) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            vision.channels,
            vision.hidden,
            vision.patch_size,
            stride=vision.patch_size,
            bias=not vision.class_token,
            device="meta",
        )
        self.class_embedding = (
            nn.Parameter(torch.empty(vision.hidden, device="meta"), requires_grad=False) if vision.class_token else None
        )
        self.position_embedding = nn.Embedding(vision.tokens + vision.class_token, vision.hidden, device="meta")

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(V, 3, H, W) -> (1, V * T, D), view by view, T = N or with a class token 1 + N."""
        patches = self.patch_embedding(pixel_values)
        views, width, rows, columns = patches.shape
        tokens = patches.reshape(views, width, rows * columns).permute(0, 2, 1)
        if self.class_embedding is not None:
            first = self.class_embedding.reshape(1, 1, width)
            tokens = torch.cat([first if views == 1 else first.expand(views, 1, width), tokens], dim=1)
        placed: Tensor = tokens + self.position_embedding.weight
        return placed if views == 1 else placed.reshape(1, -1, width)


def tower_layers(vision: VisionGeometry, count: int, *, windows: int = 1) -> nn.ModuleList:
    """The first `count` layers, over so many pictures, one behind the other."""
    return nn.ModuleList(
        TowerLayer(
            width=vision.hidden,
            heads=vision.heads,
            inner=vision.mlp,
            activation=vision.activation,
            norm_eps=vision.norm_eps,
            windows=windows,
        )
        for _ in range(count)
    )


def projector(geometry: LlavaGeometry) -> Projector:
    """From the tower's width to the decoder's."""
    return Projector(
        width=geometry.vision.hidden,
        out=geometry.text.hidden,
        activation=geometry.projector_activation,
        bias=geometry.projector_bias,
    )


class ClipTower(nn.Module):
    """The tower, or its first `layers`, and the projector; SigLIP's has no class token, and no norm in front.

    With `merge` that many rows and columns of patches are one image token, side by side (pixel shuffle). With
    `post_norm` the last layer's output is normed first.
    """

    def __init__(
        self,
        vision: VisionGeometry,
        *,
        projector: nn.Module,
        layers: int | None = None,
        merge: int = 1,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        self.merge, (self.rows, self.columns) = merge, (side // merge for side in vision.grid)
        self.first = int(vision.class_token)
        self.embeddings = PatchEmbeddings(vision)
        # The missing e is in the published tensor names.
        self.pre_layrnorm = LayerNorm(vision.hidden, vision.norm_eps) if vision.class_token else None
        self.layers = tower_layers(vision, vision.layers if layers is None else layers)
        self.post_layernorm = LayerNorm(vision.hidden, vision.norm_eps) if post_norm else None
        self.projector = projector

    def forward(self, pixel_values: Tensor, *, attention: bool = False) -> Seen:
        """(1, 3, H, W) -> features (1, N, D) and keys (1, N, merge * merge * Dv) of the last layer run.

        Both are without the class token. With `attention` also what this gives to each patch in that layer.
        """
        hidden = self.embeddings(pixel_values)
        if self.pre_layrnorm is not None:
            hidden = self.pre_layrnorm(hidden)
        entered, keys = hidden, hidden
        for layer in self.layers:
            entered = hidden
            hidden, keys = layer(entered)
        given = None
        if attention:
            last = self.layers[-1]
            assert isinstance(last, TowerLayer)
            given = last.attention_of_first(entered, keys)[:, 1:]
        if self.post_layernorm is not None:
            hidden = self.post_layernorm(hidden)
        return Seen(self.projector(self._merged(hidden)), self._merged(keys), given)

    def _merged(self, x: Tensor) -> Tensor:
        """Patches of an image token side by side, row by row: (1, first + T, W) -> (1, N, merge * merge * W)"""
        x = x[:, 1:] if self.first else x
        if self.merge == 1:
            return x
        together = blocks(x, self.rows, self.merge, self.columns, self.merge)
        return together.reshape(1, self.rows * self.columns, self.merge**2 * x.shape[2])
