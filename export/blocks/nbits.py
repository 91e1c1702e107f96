"""A linear layer whose weights are packed integers of 4 or 8 bits; in ONNX it is one MatMulNBits node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from export.weights import late
from runtime.errors import CheckpointError

# Of ONNX Runtime's own operators, not of the ONNX standard.
MATMUL_NBITS = "com.microsoft::MatMulNBits"
# Lets the engine round a group's activations to 8 bits, so that it multiplies integers; where it has no kernel for
# that, it computes in float32. The error is far below that of 4-bit weights and about that of 8-bit ones, and
# without it 8-bit weights have no kernel at all: one token through 4096 x 4096 weights took 0.4 ms on one core instead
# of 130, with 4 bits 0.3 instead of 1.2.
_ACTIVATIONS_IN_8_BITS = 4
# A weight is packed in pieces of whole rows, of about so many numbers: in float32 an output matrix takes gigabytes.
_NUMBERS_AT_ONCE = 2**22


class NBitsLinear(nn.Module):
    """(..., K) -> (..., N), as the linear layer that it is made from, but for the rounding of its weights.

    Each `group` of inputs of an output has a scale, and its weights are (packed - 2^(bits-1)) * scale: symmetric, which
    is the form that kernels of phones have. The weight of largest magnitude becomes the most negative integer, whatever
    its sign, as ONNX Runtime's own quantiser has it, so that none of the integers goes unused.
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self, layer: nn.Linear, *, bits: Literal[4, 8], group: int, scale_dtype: torch.dtype = torch.float32
    ) -> None:
        """`group` must divide the layer's inputs. A weight that waits in its checkpoint goes on waiting.

        `scale_dtype` is what scales are stored in; the engine takes them in float32. CheckpointError for weights whose
        scales it does not hold.
        """
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bits, self.group = bits, group

        def made(weight: Tensor) -> Mapping[str, Tensor]:
            return pack(weight, bits=bits, group=group, scale_dtype=scale_dtype)

        waiting = late(layer.weight)
        step = f"nbits{bits}-g{group}-{scale_dtype}"
        held = made(layer.weight.detach()) if waiting is None else waiting.then(step, made).stand_ins()
        self.register_buffer("packed", held["packed"])
        self.register_buffer("scales", held["scales"])
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    @property
    def weight(self) -> Tensor:
        """What the integers stand for: (N, K) float32."""
        integers = self.packed
        if self.bits == 4:
            integers = torch.stack((integers & 15, integers >> 4), dim=3).flatten(2)
        values: Tensor = (integers.float() - 2 ** (self.bits - 1)) * self.scales.float()[..., None]
        return values.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) float32"""
        if not torch.compiler.is_exporting():
            return nn.functional.linear(x, self.weight, self.bias)
        out: Tensor = torch.onnx.ops.symbolic(
            MATMUL_NBITS,
            # Where that is a cast, ONNX Runtime makes it once, when it opens the graph.
            (x, self.packed, self.scales.float()),
            {
                "K": self.in_features,
                "N": self.out_features,
                "bits": self.bits,
                "block_size": self.group,
                "accuracy_level": _ACTIVATIONS_IN_8_BITS,
            },
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return out if self.bias is None else out + self.bias


def pack(
    weight: Tensor, *, bits: Literal[4, 8], group: int, scale_dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """(N, K) -> `packed` (N, K / group, group * bits / 8) uint8, `scales` (N, K / group) in `scale_dtype`"""
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // group, group * bits // 8, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, columns // group, dtype=scale_dtype, device=weight.device)
    at_once = max(1, _NUMBERS_AT_ONCE // columns)
    for first in range(0, rows, at_once):
        piece = slice(first, first + at_once)
        part = weight[piece].float().reshape(-1, columns // group, group)
        packed[piece], scales[piece] = _packed_rows(part, bits, scale_dtype)
    if not scales.is_meta and not torch.isfinite(scales).all():
        raise CheckpointError(
            f"a weight has the value {float(weight.abs().max()):.3g}, whose scale {scale_dtype} does not hold; take "
            "--quant-text int4, which has scales in float32"
        )
    return {"packed": packed, "scales": scales}


def _packed_rows(weight: Tensor, bits: Literal[4, 8], scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N, G, group) -> (N, G, group * bits / 8) uint8, (N, G)"""
    zero = float(2 ** (bits - 1))
    largest = weight.gather(2, weight.abs().argmax(dim=2, keepdim=True))
    scales = (largest / -zero).to(scale_dtype)
    # Integers of the scale as it is stored.
    steps = torch.where(scales == 0, 0.0, 1.0 / scales.float())
    # Half a step up and down to the integer below: torch.round would bring ties to even ones.
    integers = (weight * steps + zero + 0.5).floor_().clamp_(0, 2 * zero - 1).to(torch.uint8)
    if bits == 4:
        integers = integers[..., ::2] | integers[..., 1::2] << 4
    return integers, scales.squeeze(2)
