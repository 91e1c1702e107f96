"""What to prune, as one validated value: grid, number of kept tokens, and by which method with which settings."""

from __future__ import annotations

import math
from dataclasses import dataclass

DEFAULT_METHOD = "vlm-pruner"
# Whole numbers up to here are exact in float32.
_EXACT = 2**24


class SpecError(ValueError):
    """A pruning request that has no answer; the text says what was wrong and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    """What every method is asked: which tokens there are, how many stay, and who chooses them.

    Attributes:
        grid: rows and columns of the image tokens, (h, w); N = h * w.
        overview: rows and columns of a second view of the whole photo, whose tokens come before those of the grid and
            are counted in N; None where there is one view.
        keep: number of tokens that stay, 1..N.
        method: who chooses them, a key of `pruning.METHODS`.
        settings: the method's own constants, a value of its `settings`; None takes its defaults.

    Raises:
        SpecError: a value outside its range.
    """

    grid: tuple[int, int] = (24, 24)
    overview: tuple[int, int] | None = None
    keep: int = 64
    method: str = DEFAULT_METHOD
    settings: object = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", _sides("grid", self.grid))
        if self.overview is not None:
            object.__setattr__(self, "overview", _sides("overview", self.overview))
        if self.tokens > 8192:
            raise SpecError(f"{self.views} has {self.tokens} tokens; at most 8192 can be ranked exactly in float32")
        if max(self.grid) > 2048:
            raise SpecError(f"grid={self.grid} is longer than 2048; distances on it would not be exact in float32")
        if not is_count(self.keep):
            raise SpecError(f"keep={self.keep!r} must be a whole number of at least 1")
        object.__setattr__(self, "keep", int(self.keep))
        if self.keep > self.tokens:
            raise SpecError(f"keep={self.keep} must lie in 1..{self.tokens} (the image tokens of {self.views})")
        if not isinstance(self.method, str) or not self.method:
            raise SpecError(f"method={self.method!r} must be the name of a method, such as {DEFAULT_METHOD!r}")

    @property
    def tokens(self) -> int:
        """Image tokens before pruning, N."""
        return math.prod(self.grid) + (math.prod(self.overview) if self.overview else 0)

    @property
    def views(self) -> str:
        """The grids in words."""
        words = "a {} x {} grid".format(*self.grid)
        return words + (" behind an overview of {} x {}".format(*self.overview) if self.overview else "")

    @property
    def steps(self) -> int:
        """Steps in which places are told, for each token of the grid: 1 where the grid is all there is.

        A power of two, as fine as squared distances stay exact in float32.
        """
        if self.overview is None:
            return 1
        steps = 1
        while 4 * steps**2 * sum(side**2 for side in self.grid) <= _EXACT:
            steps *= 2
        return steps

    @property
    def extent(self) -> tuple[int, int]:
        """How high and wide the photo is, in steps."""
        return self.grid[0] * self.steps, self.grid[1] * self.steps

    def places(self) -> list[tuple[int, int]]:
        """Where the centre of each token lies in the photo, (row, column) in steps from the grid's first token.

        Both views show the whole photo, so a distance means the same within a view and between the two.
        """
        grid = [(y * self.steps, x * self.steps) for y in range(self.grid[0]) for x in range(self.grid[1])]
        if self.overview is None:
            return grid
        rows, columns = (
            [round(((2 * at + 1) * fine / coarse - 1) / 2 * self.steps) for at in range(coarse)]
            for fine, coarse in zip(self.grid, self.overview, strict=True)
        )
        return [(y, x) for y in rows for x in columns] + grid


def _sides(name: str, given: object) -> tuple[int, int]:
    sides = tuple(given) if isinstance(given, (tuple, list)) else ()
    if len(sides) != 2 or not all(is_count(side) for side in sides):
        raise SpecError(f"{name}={given!r} must be two positive whole numbers: rows and columns of image tokens")
    return int(sides[0]), int(sides[1])


def is_count(value: object) -> bool:
    """True for a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
