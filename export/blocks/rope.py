"""Rotary tables: the cosines and sines of absolute positions, computed once and looked up by the graphs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from export.blocks.geometry import Rope, TextGeometry


def rope_tables(text: TextGeometry, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, head_dim) float32 for absolute positions.

    The first half of each row of sines is negated, so that rotating needs no negation: see `DecoderAttention.rotate`.
    """
    steps = torch.tensor(list(positions), dtype=torch.float32)
    angles = steps[:, None] * _inverse_frequencies(text.rope, text.head_dim)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def _inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """(head_dim / 2,) float32, in the order of operations that transformers uses, hence equal to the last bit."""
    base = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind == "default":
        return base
    if rope.kind == "linear":
        return base / rope.factor
    # llama3: long waves are stretched by `factor`, short ones stay, those between are blended.
    wavelength = 2 * math.pi / base
    longest = rope.original_max_positions / rope.low_freq_factor
    shortest = rope.original_max_positions / rope.high_freq_factor
    blend = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - blend) * base / rope.factor + blend * base
    stretched = torch.where(wavelength > longest, base / rope.factor, base)
    return torch.where((wavelength <= longest) & (wavelength >= shortest), between, stretched)
