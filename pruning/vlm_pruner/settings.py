"""The constants of VLM-Pruner (arXiv 2512.02700), and what follows from them for a grid and a number of kept tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pruning.method import settings_of
from pruning.spec import PruneSpec, SpecError, is_count

NAME = "vlm-pruner"
RANK_EVERY = 4  # steps of the static form between two chances to begin a pass: ranking costs more than a step


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The constants of VLM-Pruner; the defaults are those of the paper's main results.

    Attributes:
        pivots: number of pivot tokens that start the selection (fewer when fewer tokens stay).
        norm_pivots: how many of them are those of the largest keys; each further one is farthest from those so far.
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

    pivots: int = 4
    norm_pivots: int = 1
    threshold: float = 0.8
    threshold_step: float = 0.1
    token_batch: int = 16
    channels: int = 256
    distance_weight: float = 0.5
    recovery: float = 0.7
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("pivots", "norm_pivots", "token_batch", "channels"):
            if not is_count(getattr(self, name)):
                raise SpecError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.steps is not None and not is_count(self.steps):
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

    @classmethod
    def of(cls, spec: PruneSpec) -> Settings:
        """Gives the spec's settings, the paper's where it has none; SpecError for those of another method."""
        return settings_of(spec, NAME, cls)

    def first_pivots(self, keep: int) -> int:
        """Counts the pivots that are really used: never more than the tokens to keep."""
        return min(self.pivots, keep)

    def distance_slope(self, extent: tuple[int, int]) -> float:
        """Tells by how much the buffer for spatial sparsity grows for each step of distance.

        The unit of distance is the diagonal of the photo, which is so many steps high and wide.
        """
        return self.distance_weight / math.hypot(*extent)

    def sure_steps(self, keep: int) -> int:
        """Counts steps of the static form that reach `keep` whatever the features.

        A step that is not idle selects at least one token, and a pass idles at most RANK_EVERY - 1 steps at its end.
        """
        needed = keep - self.first_pivots(keep)
        return needed + len(self.levels()) * (RANK_EVERY - 1) if needed else 0

    def default_steps(self, keep: int) -> int:
        """Counts steps that were enough in every case measured, and never more than `sure_steps`.

        Measured need on the golden features: 25, 30 and 38 for 64, 128 and 192 kept tokens in batches of 16, 43, 81 and
        111 in batches of 4; none of 16000 random small grids needed more than 21 where this gives 24.
        """
        needed = keep - self.first_pivots(keep)
        likely = 20 + 4 * needed // self.token_batch
        return min(self.sure_steps(keep), -(-likely // RANK_EVERY) * RANK_EVERY)

    def static_steps(self, keep: int) -> int:
        """Counts the steps that the static form takes."""
        return self.default_steps(keep) if self.steps is None else min(self.steps, self.sure_steps(keep))

    def levels(self) -> tuple[float, ...]:
        """Lists the thresholds of all passes that can ever accept a token.

        A cosine is at most 1 (plus rounding) and a distance at most one diagonal, so the adjusted similarity stays
        below 1.01 * (1 + distance_weight) and the last level accepts whatever is left.
        """
        highest = 1.01 * (1.0 + self.distance_weight)
        passes = max(0, math.ceil((highest - self.threshold) / self.threshold_step)) + 1
        return tuple(self.threshold + self.threshold_step * number for number in range(passes))
