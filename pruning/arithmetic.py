"""Static pieces that pruners share: choices by number, in the few operators that mobile delegates keep whole.

Only bmm, softmax, max_pool2d, minimum, add, sub, mul, div, abs, sqrt, clamp, pad, cat, slice, view, reshape and
permute appear: no comparison, gather, scatter, sort or reduction, which the delegates refuse or split the graph at. A
comparison of two numbers is `clamp(difference * HUGE, 0, 1)`, exactly 0 or 1; a gather is a product with a one-hot
matrix; the place in an order is a count of smaller ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

HUGE = 2.0**60  # turns any difference of two unequal float32 numbers above 1e-10 into at least 1
GRAIN = 2.0**24  # more than all positions times APART
APART = 128.0  # softmax of inputs this far apart is exactly one-hot in float32 (exp(-104) is already 0)
PART = 64  # channels whose products are added up at once
COARSE = 8.0  # added to a number near 1 it leaves a multiple of 2^-20, so that sums in another order make the same one
LEAST_NORM = 1e-12  # shorter rows have no direction


def above(high: Tensor, low: Tensor) -> Tensor:
    """1 where high > low, else 0."""
    return ((high - low) * HUGE).clamp(0.0, 1.0)


def equal(place: Tensor, other: Tensor) -> Tensor:
    """1 where two whole numbers are equal, else 0."""
    return (1.0 - (place - other).abs()).clamp(0.0, 1.0)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product whose sums are rounded half as much: (B, M, K), (B, K, N) -> (B, M, N).

    Engines add one term after another, and each addition rounds as coarsely as the sum so far is large. Similarities
    decide by their last bits which token stands for another, so sums over few terms are added pairwise instead.
    """
    if left.shape[2] <= PART:
        return torch.bmm(left, right)
    sums = [torch.bmm(left[:, :, at : at + PART], right[:, at : at + PART]) for at in range(0, left.shape[2], PART)]
    while len(sums) > 1:
        pairs = [one + other for one, other in zip(sums[::2], sums[1::2], strict=False)]
        sums = pairs + sums[2 * len(pairs) :]
    return sums[0]


def outer_difference(values: Tensor) -> Tensor:
    """Element [i, j] = value j - value i: (B, 1, N) or (B, N, 1) -> (B, N, N)."""
    return values.view(len(values), 1, -1) - values.view(len(values), -1, 1)


def first_largest(score: Tensor, position: Tensor) -> Tensor:
    """One-hot of the first largest element along the last axis: (B, R, N), (1, 1, N) -> (B, R, N)."""
    tied = (torch.softmax(score * HUGE, -1) * (2.0 * score.shape[2])).clamp(0.0, 1.0)
    return torch.softmax(tied * GRAIN - position * APART, -1)
