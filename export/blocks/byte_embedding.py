"""A table of rows in 8 bits; in ExecuTorch looking rows up in it is one of its own operators."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

# A scale for so many numbers of a row, so that one large number costs its neighbours alone; an eighth more bytes.
GROUP = 32


class ByteEmbedding(nn.Module):
    """ids (1, T) int64 -> (1, T, D) float32, as the embedding it is made from, but for the rounding of its rows."""

    rows: Tensor
    scales: Tensor

    def __init__(self, table: Tensor) -> None:
        """`table` (V, D) of any floating-point type; D is a multiple of `GROUP`, or one group."""
        super().__init__()
        _register_operator()
        tokens, width = table.shape
        group = GROUP if width % GROUP == 0 else width
        rows = torch.empty(tokens, width, dtype=torch.int8)
        scales = torch.empty(tokens, width // group)
        # In pieces: in float32 a whole table of 7B takes half a gigabyte.
        for start in range(0, tokens, 4096):
            piece = table[start : start + 4096].float().view(-1, width // group, group)
            scale = piece.abs().amax(dim=2) / 127.0
            steps = torch.where(scale == 0, 0.0, 1.0 / scale)
            rows[start : start + 4096] = (piece * steps[..., None]).round().to(torch.int8).view(-1, width)
            scales[start : start + 4096] = scale
        self.register_buffer("rows", rows)
        self.register_buffer("scales", scales)

    def forward(self, ids: Tensor) -> Tensor:
        """(1, T) -> (1, T, D)"""
        out: Tensor = torch.ops.quantized_decomposed.embedding_byte(self.rows, self.scales, None, -128, 127, ids)
        return out


def _register_operator() -> None:
    """Makes the operator known, for eager mode, for tracing, and with the form that programs hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the library, which nobody here can act on
        import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401 - the import registers
        import torch.ao.quantization.fx._decomposed  # noqa: F401 - as does this
