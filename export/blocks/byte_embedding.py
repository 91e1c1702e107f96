"""A table of rows in 8 bits; looking rows up in it is one operator of the engine's own."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from export.weights import late

# A scale for so many numbers of a row, so that one large number costs its neighbours alone; an eighth more bytes.
GROUP = 32


# Of ONNX Runtime's own operators, not of the ONNX standard; its bytes stand for themselves less 128.
GATHER_BLOCK_QUANTIZED = "com.microsoft::GatherBlockQuantized"


class ByteEmbedding(nn.Module):
    """ids (1, T) int64 -> (1, T, D) float32, as the embedding it is made from, but for the rounding of its rows.

    For ExecuTorch.
    """

    rows: Tensor
    scales: Tensor

    def __init__(self, table: Tensor) -> None:
        """`table` (V, D) of any floating-point type; D is a multiple of `GROUP`, or one group."""
        super().__init__()
        _register_operator()
        for name, made in _rounded(table, GROUP if table.shape[1] % GROUP == 0 else table.shape[1]).items():
            self.register_buffer(name, made)

    def forward(self, ids: Tensor) -> Tensor:
        """(1, T) -> (1, T, D)"""
        out: Tensor = torch.ops.quantized_decomposed.embedding_byte(self.rows, self.scales, None, -128, 127, ids)
        return out


class GatheredByteEmbedding(nn.Module):
    """ids (1, T) int64 -> (1, T, D) float32, the same with the same rounding, for ONNX Runtime."""

    rows: Tensor
    scales: Tensor

    def __init__(self, table: Tensor) -> None:
        """`table` (V, D) of any floating-point type, D a multiple of `GROUP`; it may wait in its checkpoint."""
        super().__init__()
        waiting = late(table)
        held = _unsigned(table) if waiting is None else waiting.then("rows in int8", _unsigned).stand_ins()
        for name, made in held.items():
            self.register_buffer(name, made)

    def forward(self, ids: Tensor) -> Tensor:
        """(1, T) -> (1, T, D)"""
        if not torch.compiler.is_exporting():
            grouped = (self.rows[ids].float() - 128).view(*ids.shape, -1, GROUP)
            return (grouped * self.scales[ids][..., None]).flatten(2)
        out: Tensor = torch.onnx.ops.symbolic(
            GATHER_BLOCK_QUANTIZED,
            (self.rows, ids, self.scales),
            {"gather_axis": 0, "quantize_axis": 1, "block_size": GROUP, "bits": 8},
            dtype=torch.float32,
            shape=(*ids.shape, self.rows.shape[1]),
            version=1,
        )
        return out


def _rounded(table: Tensor, group: int) -> dict[str, Tensor]:
    """(V, D) -> `rows` (V, D) int8, `scales` (V, D / group) float32"""
    tokens, width = table.shape
    rows = torch.empty(tokens, width, dtype=torch.int8, device=table.device)
    scales = torch.empty(tokens, width // group, device=table.device)
    # In pieces: in float32 a whole table of 7B takes half a gigabyte.
    for start in range(0, tokens, 4096):
        piece = table[start : start + 4096].float().view(-1, width // group, group)
        scale = piece.abs().amax(dim=2) / 127.0
        steps = torch.where(scale == 0, 0.0, 1.0 / scale)
        rows[start : start + 4096] = (piece * steps[..., None]).round().to(torch.int8).view(-1, width)
        scales[start : start + 4096] = scale
    return {"rows": rows, "scales": scales}


def _unsigned(table: Tensor) -> dict[str, Tensor]:
    """The same with `rows` as uint8, 128 more each."""
    made = _rounded(table, GROUP)
    return {**made, "rows": made["rows"].view(torch.uint8).bitwise_xor_(128)}


def _register_operator() -> None:
    """Makes the operator known, for eager mode, for tracing, and with the form that programs hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the library, which nobody here can act on
        import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401 - the import registers
        import torch.ao.quantization.fx._decomposed  # noqa: F401 - as does this
