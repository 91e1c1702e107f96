"""What the loops of several methods share: cosines, the best of what is free, and the trace of a choice."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pruning.arithmetic import COARSE, LEAST_NORM
from pruning.method import Recovery, Trace
from pruning.recovery import CANCELLATION, recovered


class Choice(NamedTuple):
    """The tokens of one image in the order of selection, by how much each led, and those that a picture marks."""

    order: list[int]
    margin: list[float]
    marks: list[int]


def precise(x: Tensor) -> Tensor:
    """The tensor in what oracles compute in: float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def units(rows: Tensor) -> Tensor:
    """Rows brought to length 1, those of no direction left near 0: (N, D) -> (N, D)."""
    return rows / rows.square().sum(-1, keepdim=True).sqrt().clamp(min=LEAST_NORM)


def apart(left: Tensor, right: Tensor) -> Tensor:
    """1 - cosine of units: (M, D), (N, D) -> (M, N), in multiples of 2^-20 as the static forms have them."""
    return (COARSE + 1.0) - (left @ right.T + COARSE)


def shares(attention: Tensor) -> Tensor:
    """Attention in shares of what one of N tokens has on average: (B, N) -> (B, N).

    Where the average is 1 these are multiples of 2^-20, as the static forms have them.
    """
    return attention * float(attention.shape[1]) + COARSE


def best_free(score: Tensor, free: Tensor) -> tuple[int, float]:
    """The first largest score among free tokens (N,), and its lead over the runner-up; infinite where there is none."""
    ranked = score.masked_fill(~free, -torch.inf)
    best = int(ranked.argmax())
    others = free.clone()
    others[best] = False
    lead = float(ranked[best] - score[others].max()) if bool(others.any()) else torch.inf
    return best, lead


def farthest(first: Tensor, distance: Tensor, keep: int, weight: Tensor | None = None) -> Choice:
    """The largest of `first` (N,), then one by one what is farthest from all chosen, times its weight: (N, N), (N,)."""
    free = torch.ones(len(first), dtype=torch.bool)
    score = first
    order: list[int] = []
    margin: list[float] = []
    while len(order) < keep:
        best, lead = best_free(score, free)
        order.append(best)
        margin.append(lead)
        free[best] = False
        nearest = distance[:, order].min(1).values
        score = nearest if weight is None else weight * nearest
    return Choice(order, margin, [])


def trace_of(hidden: Tensor, choices: list[Choice], similarity: list[Tensor], *, share: float = 0.0) -> Trace:
    """The trace of a choice whose tokens are recovered: hidden (B, N, D), similarity (N, N) of each image.

    Where `share` is 0 they stay as they are, but with the similarity the rows of any other choice are told too.
    """
    order = torch.tensor([choice.order for choice in choices])
    indices = order.sort().values
    if share:
        images = zip(similarity, precise(hidden), indices, strict=True)
        tokens = torch.stack([recovered(to, x, kept, share) for to, x, kept in images]).to(hidden.dtype)
    else:
        tokens = hidden.cpu().gather(1, indices[..., None].expand(-1, -1, hidden.shape[2])).to(hidden.device)
    return Trace(
        tokens=tokens,
        indices=indices,
        order=order,
        margin=torch.tensor([choice.margin for choice in choices], dtype=torch.float32),
        marks=torch.tensor([choice.marks for choice in choices], dtype=torch.int64).view(len(choices), -1),
        recovery=Recovery(similarity=torch.stack(similarity), share=share, least_share=CANCELLATION if share else 1.0),
    )
