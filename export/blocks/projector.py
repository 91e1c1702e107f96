"""A projector of one or two linear layers as a static module: from a tower's width to the decoder's."""

from __future__ import annotations

from torch import Tensor, nn

from export.blocks.tower_layer import ACTIVATIONS


class Projector(nn.Module):
    """Two linear layers around an activation, a key of ACTIVATIONS, or without any a single layer.

    Between the two are `inner` channels, by default `out`.
    """

    def __init__(self, *, width: int, out: int, activation: str | None, bias: bool, inner: int | None = None) -> None:
        super().__init__()
        between = out if inner is None else inner
        self.linear_1 = nn.Linear(width, between, bias=bias, device="meta")
        self.activation = ACTIVATIONS[activation]() if activation is not None else None
        self.linear_2 = nn.Linear(between, out, bias=bias, device="meta") if activation is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """(1, N, Dv) -> (1, N, D)"""
        out: Tensor = self.linear_1(x)
        if self.activation is not None and self.linear_2 is not None:
            out = self.linear_2(self.activation(out))
        return out
