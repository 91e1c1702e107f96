"""What to prune, as one validated value: grid, number of kept tokens, and by which method with which settings."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_METHOD = "vlm-pruner"


class SpecError(ValueError):
    """A pruning request that has no answer; the text says what was wrong and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    """What every method is asked: which tokens there are, how many stay, and who chooses them.

    Attributes:
        grid: rows and columns of the image tokens, (h, w); N = h * w.
        keep: number of tokens that stay, 1..N.
        method: who chooses them, a key of `pruning.METHODS`.
        settings: the method's own constants, a value of its `settings`; None takes its defaults.

    Raises:
        SpecError: a value outside its range.
    """

    grid: tuple[int, int] = (24, 24)
    keep: int = 64
    method: str = DEFAULT_METHOD
    settings: object = None

    def __post_init__(self) -> None:
        grid = tuple(self.grid) if isinstance(self.grid, (tuple, list)) else ()
        if len(grid) != 2 or not all(is_count(side) for side in grid):
            raise SpecError(f"grid={self.grid!r} must be two positive whole numbers: rows and columns of image tokens")
        object.__setattr__(self, "grid", (int(grid[0]), int(grid[1])))
        if self.tokens > 8192:
            raise SpecError(f"grid={self.grid} has {self.tokens} tokens; at most 8192 can be ranked exactly in float32")
        if max(self.grid) > 2048:
            raise SpecError(f"grid={self.grid} is longer than 2048; distances on it would not be exact in float32")
        if not is_count(self.keep):
            raise SpecError(f"keep={self.keep!r} must be a whole number of at least 1")
        object.__setattr__(self, "keep", int(self.keep))
        if self.keep > self.tokens:
            raise SpecError(
                f"keep={self.keep} must lie in 1..{self.tokens} (the image tokens of a {grid[0]} x {grid[1]} grid)"
            )
        if not isinstance(self.method, str) or not self.method:
            raise SpecError(f"method={self.method!r} must be the name of a method, such as {DEFAULT_METHOD!r}")

    @property
    def tokens(self) -> int:
        """Image tokens before pruning, N."""
        return self.grid[0] * self.grid[1]


def is_count(value: object) -> bool:
    """True for a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
