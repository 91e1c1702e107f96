"""A projector of two linear layers as a static module: from a tower's width to the decoder's."""

from __future__ import annotations

from torch import Tensor, nn

from export.blocks.tower_layer import ACTIVATIONS


class Projector(nn.Module):
    """Two linear layers around an activation, a key of ACTIVATIONS."""

    def __init__(self, *, width: int, out: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, out, bias=bias, device="meta")
        self.activation = ACTIVATIONS[activation]()
        self.linear_2 = nn.Linear(out, out, bias=bias, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """(1, N, Dv) -> (1, N, D)"""
        out: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return out
