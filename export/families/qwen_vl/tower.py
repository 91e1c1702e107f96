"""The vision towers of Qwen2-VL and its successors with their mergers, for one size of image, as one static module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from export.blocks.attention import blocks
from export.blocks.projector import Projector
from export.blocks.rope import turns
from export.blocks.rotary_tower import RotaryTowerLayer, tower_norm
from export.families.family import Seen
from export.families.qwen_vl.config import TOWER_NORM_EPS, QwenGeometry
from export.weights import Change


def _of_a_still(weight: Tensor) -> Tensor:
    """Filters over frames, for one picture that is shown in all of them: (D, 3, F, p, p) -> (D, 3, p, p)"""
    return weight.sum(2)


class StillEmbedding(nn.Module):
    """Patches of one picture: filters over several frames, summed, because a photo stands in for all frames."""

    as_read: Mapping[str, tuple[str, Change]] = {"weight": ("frames summed", _of_a_still)}

    def __init__(self, *, channels: int, width: int, frames: int, patch_size: int, bias: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        stored = torch.empty(width, channels, frames, patch_size, patch_size, device="meta")
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width, device="meta"), requires_grad=False) if bias else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(1, 3, H, W) -> (1, D, rows, columns)"""
        return nn.functional.conv2d(pixel_values, self.weight, self.bias, stride=self.patch_size)


class StretchedPositions(nn.Module):
    """Positions learnt for a square of patches, stretched over `rows` x `columns` of them when they are read."""

    def __init__(self, *, table: int, width: int, rows: int, columns: int) -> None:
        super().__init__()
        stored = torch.empty(table * table, width, device="meta")
        self.weight = nn.Parameter(stored, requires_grad=False)

        def stretched(weight: Tensor) -> Tensor:
            """(table * table, D) -> (rows * columns, D)"""
            square = weight.t().reshape(1, width, table, table)
            spread = nn.functional.interpolate(square, (rows, columns), mode="bilinear", align_corners=True)
            return spread.reshape(width, rows * columns).t().contiguous()

        self.as_read: Mapping[str, tuple[str, Change]] = {
            "weight": (f"stretched over {rows} x {columns} patches", stretched)
        }

    def forward(self, patches: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D)"""
        return patches + self.weight


class PlaneMerger(nn.Module):
    """Makes of a layer's output what a decoder layer's output is added: patches of an image token as one, normed."""

    def __init__(self, *, width: int, out: int) -> None:
        super().__init__()
        self.norm = tower_norm(width, TOWER_NORM_EPS, gated=False)
        self.projector = Projector(width=width, inner=width, out=out, activation="gelu", bias=True)

    def forward(self, merged: Tensor) -> Tensor:
        """(1, N, merge * merge * Dv) -> (1, N, D)"""
        out: Tensor = self.projector(self.norm(merged))
        return out


class QwenTower(nn.Module):
    """All layers of the tower, and the merger, which makes one image token of `merge` x `merge` patches.

    Patches of one image token stand together, and image tokens of one window; both are orders of rows, made and undone
    by shapes alone. Layers that see windows then cut the rows into equal parts.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, geometry: QwenGeometry) -> None:
        super().__init__()
        tower = geometry.tower
        self.rows, self.columns = geometry.grid
        self.merge, self.window = tower.merge, tower.window
        self.patch_embedding = StillEmbedding(
            channels=tower.channels,
            width=tower.hidden,
            frames=tower.frames,
            patch_size=tower.patch_size,
            bias=tower.patch_bias,
        )
        self.position_embedding: nn.Module | None = None
        if tower.table is not None:
            rows, columns = self.rows * tower.merge, self.columns * tower.merge
            self.position_embedding = StretchedPositions(
                table=tower.table, width=tower.hidden, rows=rows, columns=columns
            )
        self.layers = nn.ModuleList(
            RotaryTowerLayer(
                width=tower.hidden,
                heads=tower.heads,
                inner=tower.mlp,
                activation=tower.activation,
                norm_eps=TOWER_NORM_EPS,
                gated=tower.gated,
                windows=tower.windows(index, geometry.grid),
            )
            for index in range(tower.layers)
        )
        self.norm = tower_norm(tower.hidden, TOWER_NORM_EPS, gated=tower.gated)
        merged = tower.hidden * tower.merge**2
        self.projector = Projector(width=merged, inner=merged, out=geometry.text.hidden, activation="gelu", bias=True)
        self.planes = nn.ModuleList(PlaneMerger(width=merged, out=geometry.text.hidden) for _ in tower.planes)
        self.behind = tower.planes
        # Half of a head's angles are turned by the row, half by the column.
        spatial = tower.hidden // tower.heads // 2
        frequencies = 1.0 / (tower.theta ** (torch.arange(0, spatial, 2, dtype=torch.float) / spatial))
        y, x = torch.meshgrid(
            torch.arange(self.rows * tower.merge), torch.arange(self.columns * tower.merge), indexing="ij"
        )
        angles = torch.cat([axis.reshape(-1, 1) * frequencies for axis in (y, x)], dim=1)
        cos, sin = turns(self._together(angles[None])[0])
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, pixel_values: Tensor) -> Seen:
        """(1, 3, H, W) -> features (1, N, D), and the last layer's keys (1, N, merge * merge * Dv).

        The keys of an image token are those of its patches side by side, after the rotary embedding.
        """
        patches = self.patch_embedding(pixel_values)
        hidden = patches.reshape(1, patches.shape[1], -1).permute(0, 2, 1)
        if self.position_embedding is not None:
            hidden = self.position_embedding(hidden)
        hidden = self._together(hidden)
        keys, planes, tokens = hidden, [], self.rows * self.columns
        for index, layer in enumerate(self.layers):
            hidden, keys = layer(hidden, self.cos, self.sin)
            if index in self.behind:
                merger = self.planes[self.behind.index(index)]
                planes.append(self._in_rows(merger(hidden.reshape(1, tokens, -1))))
        features = self.projector(self.norm(hidden).reshape(1, tokens, -1))
        in_rows = self._in_rows(keys.reshape(1, tokens, -1))
        return Seen(self._in_rows(features), in_rows, planes=tuple(planes))

    def _together(self, x: Tensor) -> Tensor:
        """Patches row by row -> those of an image token, and image tokens of a window, together: (1, T, D) -> same."""
        _, patches, width = x.shape
        tokens = blocks(x, self.rows, self.merge, self.columns, self.merge)
        if self.window is not None:
            tokens = tokens.reshape(1, self.rows * self.columns, -1)
            tokens = blocks(tokens, self.rows // self.window, self.window, self.columns // self.window, self.window)
        return tokens.reshape(1, patches, width)

    def _in_rows(self, x: Tensor) -> Tensor:
        """Image tokens window by window -> row by row: (1, N, D) -> same."""
        if self.window is None:
            return x
        return blocks(x, self.rows // self.window, self.columns // self.window, self.window, self.window).reshape(
            x.shape
        )
