"""What to prune, as one validated value: grid, number of kept tokens and the paper's constants."""

from __future__ import annotations

import math
from dataclasses import dataclass

RANK_EVERY = 4  # steps of the static form between two chances to begin a pass: ranking costs more than a step


class SpecError(ValueError):
    """A pruning request that has no answer; the text says what was wrong and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    """The constants of VLM-Pruner (arXiv 2512.02700); the defaults are the paper's for LLaVA-1.5.

    Attributes:
        grid: rows and columns of the image tokens, (h, w); N = h * w.
        keep: number of tokens that stay, 1..N.
        pivots: number of pivot tokens that start the selection (fewer when keep is smaller).
        threshold: the first pass accepts tokens whose adjusted similarity is below it.
        threshold_step: how much each further pass raises the threshold.
        token_batch: candidates that are judged together, without seeing each other.
        channels: hidden channels of largest variance that the similarity uses (all of them when there are fewer).
        distance_weight: weight of the grid distance in the buffering for spatial sparsity.
        recovery: share of a kept token that is replaced by the tokens it stands for.
        steps: steps of the static form; None takes `default_steps`, and `sure_steps` can never run out.

    Raises:
        SpecError: a value outside its range.
    """

    grid: tuple[int, int] = (24, 24)
    keep: int = 64
    pivots: int = 4
    threshold: float = 0.8
    threshold_step: float = 0.1
    token_batch: int = 16
    channels: int = 256
    distance_weight: float = 0.5
    recovery: float = 0.7
    steps: int | None = None

    def __post_init__(self) -> None:
        grid = tuple(self.grid) if isinstance(self.grid, (tuple, list)) else ()
        if len(grid) != 2 or not all(_is_count(side) for side in grid):
            raise SpecError(f"grid={self.grid!r} must be two positive whole numbers: rows and columns of image tokens")
        object.__setattr__(self, "grid", (int(grid[0]), int(grid[1])))
        if self.tokens > 8192:
            raise SpecError(f"grid={self.grid} has {self.tokens} tokens; at most 8192 can be ranked exactly in float32")
        if max(self.grid) > 2048:
            raise SpecError(f"grid={self.grid} is longer than 2048; distances on it would not be exact in float32")
        for name in ("keep", "pivots", "token_batch", "channels"):
            if not _is_count(getattr(self, name)):
                raise SpecError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.keep > self.tokens:
            raise SpecError(
                f"keep={self.keep} must lie in 1..{self.tokens} (the image tokens of a {grid[0]} x {grid[1]} grid)"
            )
        if self.steps is not None and not _is_count(self.steps):
            raise SpecError(f"steps={self.steps!r} must be a whole number of at least 1, or None for the default")
        for name, low, high in (
            ("threshold", -1.0, 2.0),
            ("threshold_step", 0.01, 1.0),
            ("distance_weight", 0.0, 4.0),
            ("recovery", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise SpecError(f"{name}={value!r} must be a number in {low:g}..{high:g}")
            object.__setattr__(self, name, float(value))

    @property
    def tokens(self) -> int:
        """Image tokens before pruning, N."""
        return self.grid[0] * self.grid[1]

    @property
    def first_pivots(self) -> int:
        """Pivots that are really used: never more than the tokens to keep."""
        return min(self.pivots, self.keep)

    @property
    def diagonal(self) -> float:
        """Length of the grid's diagonal, in tokens: the unit of distance."""
        return math.hypot(*self.grid)

    @property
    def distance_slope(self) -> float:
        """By how much the buffer for spatial sparsity grows for each token of distance."""
        return self.distance_weight / self.diagonal

    @property
    def sure_steps(self) -> int:
        """Steps of the static form that reach `keep` whatever the features.

        A step that is not idle selects at least one token, and a pass idles at most RANK_EVERY - 1 steps at its end.
        """
        needed = self.keep - self.first_pivots
        return needed + len(self.levels()) * (RANK_EVERY - 1) if needed else 0

    @property
    def default_steps(self) -> int:
        """Steps that were enough in every case measured, and never more than `sure_steps`.

        Measured need on the golden features: 25, 30 and 38 for 64, 128 and 192 kept tokens in batches of 16, 43, 81 and
        111 in batches of 4; none of 16000 random small grids needed more than 21 where this gives 24.
        """
        needed = self.keep - self.first_pivots
        likely = 20 + 4 * needed // self.token_batch
        return min(self.sure_steps, -(-likely // RANK_EVERY) * RANK_EVERY)

    def levels(self) -> tuple[float, ...]:
        """Thresholds of all passes that can ever accept a token.

        A cosine is at most 1 (plus rounding) and a distance at most one diagonal, so the adjusted similarity stays
        below 1.01 * (1 + distance_weight) and the last level accepts whatever is left.
        """
        highest = 1.01 * (1.0 + self.distance_weight)
        passes = max(0, math.ceil((highest - self.threshold) / self.threshold_step)) + 1
        return tuple(self.threshold + self.threshold_step * number for number in range(passes))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
