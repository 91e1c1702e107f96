"""What methods share whose choice is the same for every image: a constant matrix, and the trace of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pruning.method import Arithmetic, Features, Kept, Trace, needed
from pruning.spec import PruneSpec

MOST_IN_HALF = 2048  # float16 holds every whole number up to here


class FixedChoice(nn.Module):
    """Features -> Kept by a constant matrix, because delegates split a graph at a gather.

    A row of the matrix with a single one picks a token exactly: its sum has one term.
    """

    mix: Tensor
    indices: Tensor
    filled: Tensor

    def __init__(self, spec: PruneSpec, arithmetic: Arithmetic, *, kept: Sequence[int], mix: Tensor) -> None:
        """Takes positions `kept` (keep,) ascending and `mix` (keep, N), of which a row makes a token."""
        super().__init__()
        self.spec = spec
        whole = arithmetic == "float16" and spec.tokens > MOST_IN_HALF
        indices = torch.tensor([kept], dtype=torch.int32 if whole else torch.float32)
        self.register_buffer("mix", mix[None].clone(), persistent=False)
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("filled", torch.zeros(1, 1), persistent=False)

    def forward(self, features: Features) -> Kept:
        """hidden (B, N, D) -> tokens (B, keep, D), indices (B, keep), filled (B, 1)"""
        hidden = needed(features, self.spec, frozenset()).hidden
        images = len(hidden)
        tokens = torch.bmm(self.mix.to(hidden.dtype).expand(images, -1, -1), hidden)
        indices = self.indices.expand(images, -1)
        return Kept(
            tokens,
            indices if torch.compiler.is_exporting() else indices.long(),
            self.filled.expand(images, -1),
        )


def one_hot(kept: Sequence[int], tokens: int) -> Tensor:
    """The matrix that picks tokens as they are: (keep, N)."""
    return torch.eye(tokens)[list(kept)]


def fixed_trace(tokens: Tensor, kept: Sequence[int], *, order: Sequence[int], mix: Tensor | None = None) -> Trace:
    """The trace of a choice that compares nothing, hence with infinite margins: tokens (B, keep, D), mix (keep, N)."""
    images = len(tokens)
    return Trace(
        tokens=tokens,
        indices=torch.tensor(kept).repeat(images, 1),
        order=torch.tensor(order).repeat(images, 1),
        margin=torch.full((images, len(kept)), torch.inf),
        marks=torch.zeros((images, 0), dtype=torch.int64),
        mix=None if mix is None else mix.repeat(images, 1, 1),
    )
