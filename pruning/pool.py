"""Average pooling down to any number of tokens: a baseline that drops nothing and blurs everything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pruning.fixed import FixedChoice, fixed_trace
from pruning.method import (
    ARITHMETICS,
    Arithmetic,
    Cuts,
    Features,
    Need,
    Trace,
    check_arithmetic,
    needed,
    settings_of,
)
from pruning.spec import PruneSpec, SpecError

NAME = "pool"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """No constants: grid and number of kept tokens say everything."""


class Cell(NamedTuple):
    """A rectangle of tokens: rows and columns from a first one to one that is not of it."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def middle(self) -> tuple[int, int]:
        """The row and column that stand for it; the later one of two."""
        return (self.top + self.bottom) // 2, (self.left + self.right) // 2


class Pool:
    """Cuts the grid into `keep` cells as square as they go and averages each; its middle token lends the position.

    The grid is cut into bands of rows, each band into cells, both as equal as whole tokens allow. Where the number of
    tokens to keep is no product that fits the grid, bands differ by one cell. Of an overview nothing stays.
    """

    name = NAME
    needs: frozenset[Need] = frozenset()
    cuts = Cuts()
    arithmetics = ARITHMETICS
    settings = Settings

    def choose(self, features: Features, spec: PruneSpec) -> Trace:
        """(B, N, D) -> means of cells (B, keep, D)."""
        cells, (rows, columns) = _cells(spec), spec.grid
        hidden = needed(features, spec, self.needs).hidden
        grid = hidden[:, spec.tokens - rows * columns :].view(len(hidden), rows, columns, -1)
        means = [grid[:, cell.top : cell.bottom, cell.left : cell.right].mean((1, 2)) for cell in cells]
        kept = _positions(spec, cells)
        return fixed_trace(torch.stack(means, 1), kept, order=kept, mix=_mix(spec, cells))

    def module(self, spec: PruneSpec, arithmetic: Arithmetic) -> nn.Module:
        """Builds the static form: one product with a constant matrix."""
        check_arithmetic(arithmetic, self)
        cells = _cells(spec)
        return FixedChoice(spec, arithmetic, kept=_positions(spec, cells), mix=_mix(spec, cells))


def _cells(spec: PruneSpec) -> list[Cell]:
    """Cells in ascending position of their middles, which no two share, because no two cells overlap."""
    settings_of(spec, NAME, Settings)
    rows, columns = spec.grid
    allowed = [bands for bands in range(1, min(rows, spec.keep) + 1) if -(-spec.keep // bands) <= columns]
    if not allowed:
        raise SpecError(f"keep={spec.keep}: {NAME} averages the grid alone, whose {rows * columns} tokens are fewer")
    square = math.sqrt(spec.keep * rows / columns)
    bands = min(allowed, key=lambda count: abs(count - square))
    cells = []
    for band in range(bands):
        top, bottom = _stretch(rows, bands, band)
        first, last = _stretch(spec.keep, bands, band)
        cells += [Cell(top, bottom, *_stretch(columns, last - first, at)) for at in range(last - first)]
    return cells


def _stretch(whole: int, parts: int, at: int) -> tuple[int, int]:
    """Where the part `at` of a line begins and where it has ended, the line cut as equally as whole numbers allow."""
    return at * whole // parts, (at + 1) * whole // parts


def _positions(spec: PruneSpec, cells: list[Cell]) -> list[int]:
    before = spec.tokens - math.prod(spec.grid)
    return [before + row * spec.grid[1] + column for row, column in (cell.middle for cell in cells)]


def _mix(spec: PruneSpec, cells: list[Cell]) -> Tensor:
    """The matrix that averages: (keep, N)."""
    mix = torch.zeros(len(cells), *spec.grid)
    overview = torch.zeros(len(cells), spec.tokens - math.prod(spec.grid))
    for weights, cell in zip(mix, cells, strict=True):
        inside = weights[cell.top : cell.bottom, cell.left : cell.right]
        inside.fill_(1.0 / inside.numel())
    return torch.cat([overview, mix.flatten(1)], 1)


POOL = Pool()
