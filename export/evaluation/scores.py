"""Accuracies with intervals: photos are drawn again, not questions, since those about one photo hang together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
SHARE = 0.95


class Interval(msgspec.Struct, frozen=True):
    """A share or a difference of shares: its value, and the bounds that 95 % of redrawn sets of photos lie in."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"


def accuracy(right: Sequence[Sequence[bool]]) -> Interval:
    """The share of right answers; `right` has one row a photo."""
    counts, totals = _sums(right)
    drawn = _draws(len(counts))
    return _interval(counts.sum() / totals.sum(), (drawn @ counts) / np.maximum(drawn @ totals, 1))


def difference(one: Sequence[Sequence[bool]], other: Sequence[Sequence[bool]]) -> Interval:
    """How much larger the share of right answers is in `one` than in `other`, over the same questions."""
    counts, totals = _sums(one)
    others, same = _sums(other)
    if not np.array_equal(totals, same):
        raise ValueError("two sets of answers are compared that are not to the same questions")
    drawn = _draws(len(counts))
    gains = counts - others
    return _interval(gains.sum() / totals.sum(), (drawn @ gains) / np.maximum(drawn @ totals, 1))


def by_category(right: Sequence[Sequence[bool]], categories: Sequence[Sequence[str]]) -> Mapping[str, list[list[bool]]]:
    """The answers of each category, still one row a photo, in the order in which categories come up."""
    names = list(dict.fromkeys(name for row in categories for name in row))
    return {
        name: [
            [answer for answer, kind in zip(row, kinds, strict=True) if kind == name]
            for row, kinds in zip(right, categories, strict=True)
        ]
        for name in names
    }


def _sums(right: Sequence[Sequence[bool]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return (
        np.array([sum(row) for row in right], dtype=np.float64),
        np.array([len(row) for row in right], dtype=np.float64),
    )


def _draws(photos: int) -> NDArray[np.float64]:
    """(DRAWS, photos): how often each photo is in a redrawn set; the same ones each time."""
    rng = np.random.default_rng(20260)
    return rng.multinomial(photos, np.full(photos, 1 / photos), size=DRAWS).astype(np.float64)


def _interval(value: float, drawn: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(drawn, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return Interval(float(value), float(low), float(high))
