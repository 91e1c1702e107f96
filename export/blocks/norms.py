"""LayerNorm and RMSNorm from elementary operations, so that a delegate takes a whole transformer in one piece.

XNNPACK has no native layer norm and no mean over the last dimension: the stock operators cut a tower of L layers into
2 L pieces. Here a mean is a product with a constant column, which every delegate has; XNNPACK then takes everything
in one partition at the same speed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Norm(nn.Module):
    """What both norms share: the learnt scale, and means over the last dimension in either precision."""

    # For a graph that is traced in float32 and rounded by its engine, which sums in float32 but squares in float16.
    squares_in_half = False

    average: Tensor
    inner: Tensor
    outer: Tensor
    epsilon: Tensor
    floor: Tensor
    shrink: Tensor
    half_epsilon: Tensor

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device="meta"), requires_grad=False)
        # Buffers rather than Python numbers: in a float16 graph each number would bring its own dtype copy.
        for name, value in {
            "average": torch.full((1, width), 1.0 / width),
            "epsilon": torch.tensor([epsilon]),
            "inner": torch.full((1, width // _near_root(width)), _near_root(width) / width),
            "outer": torch.full((1, _near_root(width)), 1.0 / _near_root(width)),
            "floor": torch.tensor([2.0**-14]),  # the smallest normal float16
            "shrink": torch.tensor([1.0 / 32.0]),
            "half_epsilon": torch.tensor([math.sqrt(epsilon) / 32.0]),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def mean(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, 1)"""
        if x.dtype != torch.float16:
            return nn.functional.linear(x, self.average)
        # In two steps, because a float16 kernel may also accumulate in float16: the rounding error of a running sum
        # grows with its length, and two sums of sqrt(D) terms are much shorter than one of D.
        batch, width = x.shape[0], x.shape[2]
        tokens: int | torch.SymInt = x.shape[1]
        rows = self.outer.shape[1]
        if not isinstance(tokens, int):  # an open axis: XNNPACK takes one size that is not written down
            partial = nn.functional.linear(x.view(batch, -1, width // rows), self.inner)
            return nn.functional.linear(partial.view(batch, -1, rows), self.outer)
        partial = nn.functional.linear(x.reshape(batch, tokens * rows, width // rows), self.inner)
        return nn.functional.linear(partial.reshape(batch, tokens, rows), self.outer)

    def over_root_mean_square(self, x: Tensor) -> Tensor:
        """x over sqrt(mean(x^2) + epsilon): (1, T, D) -> (1, T, D)"""
        if x.dtype != torch.float16 and not self.squares_in_half:
            return x * torch.rsqrt(self.mean(x * x) + self.epsilon)
        # Squares of float16 overflow from 256 and vanish below 2^-12, so x is first brought near 1 by its mean
        # magnitude. An outlier can then reach D at most; 1 / 32 keeps its square in range too (D up to 8192).
        size = self.mean(x.abs()) + self.floor
        small = x * (self.shrink / size)
        least = self.half_epsilon / size
        return small * torch.rsqrt(self.mean(small * small) + least * least)


class RmsNorm(Norm):
    """LLaMA's norm: x / sqrt(mean(x^2) + epsilon) * weight, (1, T, D) -> (1, T, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D)"""
        return self.over_root_mean_square(x) * self.weight


class LayerNorm(Norm):
    """CLIP's norm: centred, scaled to unit variance, times weight plus bias, (1, T, D) -> (1, T, D)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__(width, epsilon)
        self.bias = nn.Parameter(torch.empty(width, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D)"""
        return self.over_root_mean_square(x - self.mean(x)) * self.weight + self.bias


def _near_root(width: int) -> int:
    """The largest divisor of `width` that is at most its square root."""
    return max(divisor for divisor in range(1, math.isqrt(width) + 1) if width % divisor == 0)
