"""Evenly spaced tokens, whatever they hold: the baseline that every other method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.method import (
    Arithmetic,
    Cuts,
    Features,
    Kept,
    Need,
    Trace,
    check_arithmetic,
    check_features,
    check_shapes,
    settings_of,
)
from pruning.spec import PruneSpec

NAME = "uniform"
MOST_IN_HALF = 2048  # float16 holds every whole number up to here


@dataclass(frozen=True, kw_only=True)
class Settings:
    """No constants: grid and number of kept tokens say everything."""


class Uniform:
    """Cuts the N tokens, row by row, into `keep` stretches as equal as whole tokens allow; keeps the middle of each."""

    name = NAME
    needs: frozenset[Need] = frozenset()
    cuts = Cuts()
    settings = Settings

    def choose(self, features: Features, spec: PruneSpec) -> Trace:
        """(B, N, D) -> kept tokens (B, keep, D) as they are; nothing is compared, so margins are infinite."""
        settings_of(spec, NAME, Settings)
        check_features(Features(hidden=features.hidden), spec)
        images = len(features.hidden)
        kept = torch.tensor([(2 * i + 1) * spec.tokens // (2 * spec.keep) for i in range(spec.keep)])
        return Trace(
            tokens=features.hidden[:, kept],
            indices=kept.repeat(images, 1),
            order=kept.repeat(images, 1),
            margin=torch.full((images, spec.keep), torch.inf),
            marks=torch.zeros((images, 0), dtype=torch.int64),
        )

    def module(self, spec: PruneSpec, arithmetic: Arithmetic) -> nn.Module:
        """Builds the static form: one product with a constant matrix."""
        check_arithmetic(arithmetic)
        settings_of(spec, NAME, Settings)
        return _Picker(spec, arithmetic)


class _Picker(nn.Module):
    """Features -> Kept by a one-hot matrix: delegates split a graph at a gather. Exact, since each sum has one term."""

    pick: Tensor
    indices: Tensor
    filled: Tensor

    def __init__(self, spec: PruneSpec, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.spec = spec
        at = torch.arange(spec.keep)
        kept = (2 * at + 1) * spec.tokens // (2 * spec.keep)
        whole = arithmetic == "float16" and spec.tokens > MOST_IN_HALF
        self.register_buffer("pick", torch.eye(spec.tokens)[kept][None], persistent=False)
        self.register_buffer("indices", kept.to(torch.int32 if whole else torch.float32)[None], persistent=False)
        self.register_buffer("filled", torch.zeros(1, 1), persistent=False)

    def forward(self, features: Features) -> Kept:
        """(B, N, D) -> tokens (B, keep, D), indices (B, keep), filled (B, 1)"""
        exporting, hidden = torch.compiler.is_exporting(), features.hidden
        (check_shapes if exporting else check_features)(Features(hidden=hidden), self.spec)
        images = len(hidden)
        tokens = torch.bmm(self.pick.to(hidden.dtype).expand(images, -1, -1), hidden)
        indices = self.indices.expand(images, -1)
        return Kept(tokens, indices if exporting else indices.long(), self.filled.expand(images, -1))


UNIFORM = Uniform()
