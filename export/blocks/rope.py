"""Rotary tables: the cosines and sines of absolute positions, computed once and looked up by the graphs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from export.blocks.geometry import Rope, TextGeometry


def rope_tables(text: TextGeometry, *axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, head_dim) float32 for absolute positions, of one axis or of several.

    With several, `Rope.sections` says which frequencies each of them turns (arXiv 2409.12191, section 2.1), and
    `Rope.interleaved` that they take turns in this (arXiv 2511.21631).
    """
    frequencies = _inverse_frequencies(text.rope, text.head_dim)
    angles = [torch.tensor(list(axis), dtype=torch.float32)[:, None] * frequencies for axis in axes]
    if len(angles) == 1:
        return turns(angles[0])
    turned_by = torch.tensor(_axes_of_frequencies(text.rope))
    return turns(torch.stack(angles).gather(0, turned_by.expand(1, len(axes[0]), -1))[0])


def _axes_of_frequencies(rope: Rope) -> list[int]:
    """The number of the axis that turns each frequency of a head."""
    if not rope.interleaved:
        return [axis for axis, count in enumerate(rope.sections) for _ in range(count)]
    count = len(rope.sections)
    turn = ((at % count, at // count) for at in range(sum(rope.sections)))
    return [axis if before < rope.sections[axis] else 0 for axis, before in turn]


def turns(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, head_dim) of angles (T, head_dim / 2).

    The first half of each row of sines is negated, so that rotating needs no negation: see `rotate`.
    """
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(H, T, d) with tables (T, d) from `turns` -> (H, T, d)"""
    half = x.shape[2] // 2
    swapped = torch.cat([x[:, :, half:], x[:, :, :half]], dim=2)
    return x * cos + swapped * sin


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
