"""A vision tower over a photo and its tiles, with LLaVA's projector behind it, as one static module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.blocks.attention import blocks
from export.blocks.norms import LayerNorm
from export.blocks.tower_layer import TowerLayer
from export.families.family import Seen
from export.families.llava.tower import PatchEmbeddings, projector, tower_layers
from export.families.llava_tiles.config import TiledGeometry


class TiledTower(nn.Module):
    """CLIP's or SigLIP's layers over all views at once, each by itself; then tiles side by side, and row ends.

    What the tokens of the padding show is left out before it is projected.
    """

    over_rows: Tensor
    over_columns: Tensor

    def __init__(self, geometry: TiledGeometry) -> None:
        super().__init__()
        vision, self.tiling = geometry.vision, geometry.tiling
        self.views, self.side, self.patches = geometry.pixel_values[0], vision.grid[0], vision.tokens
        self.class_token = vision.class_token
        self.embeddings = PatchEmbeddings(vision)
        # The missing e is in the published tensor names.
        self.pre_layrnorm = LayerNorm(vision.hidden, vision.norm_eps) if vision.class_token else None
        self.layers = tower_layers(vision, geometry.tower_layers, windows=self.views)
        self.projector = projector(geometry)
        self.image_newline = nn.Parameter(torch.empty(geometry.text.hidden, device="meta"), requires_grad=False)
        self.pooled = self.tiling is not None and self.tiling.grid != self.tiling.seen
        if self.tiling is not None and self.pooled:
            (rows, columns), (fewer_rows, fewer_columns) = self.tiling.seen, self.tiling.grid
            self.register_buffer("over_rows", _between(rows, fewer_rows), persistent=False)
            self.register_buffer("over_columns", _between(columns, fewer_columns), persistent=False)

    def forward(self, pixel_values: Tensor, *, attention: bool = False) -> Seen:
        """(V, 3, H, W) -> features (1, T, D), row ends among them; keys (1, N, Dv) of the last layer run.

        With `attention` also what each view's class token gives to its own patches in that layer.
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
            shares = last.attention_of_first(entered, keys)
            given = self._averaged(self._seen(shares.reshape(1, -1, 1))).reshape(1, -1)
        features = self._averaged(self.projector(self._seen(hidden)))
        return Seen(self._ended(features), self._averaged(self._seen(keys)), given)

    def _seen(self, x: Tensor) -> Tensor:
        """What shows the photo of all tokens of all views, tiles side by side: (1, V * T, W) -> (1, N, W)"""
        width = x.shape[2]
        if self.class_token:
            x = x.reshape(self.views, self.patches + 1, width)[:, 1:].reshape(1, self.views * self.patches, width)
        if self.tiling is None:
            return x
        (down, across), (top, left), (rows, columns) = self.tiling.tiles, self.tiling.corner, self.tiling.seen
        tiles = blocks(x[:, self.patches :], down, across, self.side, self.side)
        tiles = tiles.reshape(down * self.side, across * self.side * width)[top : top + rows]
        tiles = tiles.reshape(rows, across * self.side, width)[:, left : left + columns]
        return torch.cat([x[:, : self.patches], tiles.reshape(1, rows * columns, width)], dim=1)

    def _averaged(self, x: Tensor) -> Tensor:
        """Fewer tokens of the tiles, by bilinear interpolation, where they are too many: (1, N, W) -> (1, M, W)"""
        if self.tiling is None or not self.pooled:
            return x
        (rows, columns), (fewer_rows, fewer_columns), width = self.tiling.seen, self.tiling.grid, x.shape[2]
        tiles = torch.bmm(self.over_rows, x[:, self.patches :].reshape(1, rows, columns * width))
        tiles = tiles.reshape(fewer_rows, columns, width).permute(1, 0, 2).reshape(1, columns, fewer_rows * width)
        tiles = torch.bmm(self.over_columns, tiles).reshape(fewer_columns, fewer_rows, width).permute(1, 0, 2)
        return torch.cat([x[:, : self.patches], tiles.reshape(1, fewer_rows * fewer_columns, width)], dim=1)

    def _ended(self, x: Tensor) -> Tensor:
        """A token behind each row of the tiles, or behind the one view there is: (1, N, D) -> (1, T, D)"""
        width = x.shape[2]
        end = self.image_newline.reshape(1, 1, width)
        if self.tiling is None:
            return torch.cat([x, end], dim=1)
        rows, columns = self.tiling.grid
        ended = torch.cat([x[:, self.patches :].reshape(rows, columns, width), end.expand(rows, 1, width)], dim=1)
        return torch.cat([x[:, : self.patches], ended.reshape(1, rows * (columns + 1), width)], dim=1)


def _between(many: int, few: int) -> Tensor:
    """Weights (1, few, many) of bilinear interpolation: centres lie alike, two neighbours count."""
    at = ((torch.arange(few, dtype=torch.float64) + 0.5) * (many / few) - 0.5).clamp(0.0, many - 1.0)
    return (1.0 - (at[:, None] - torch.arange(many)).abs()).clamp(min=0.0).float()[None]
