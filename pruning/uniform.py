"""Evenly spaced tokens, whatever they hold: the baseline that every other method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pruning.fixed import FixedChoice, fixed_trace, one_hot
from pruning.method import (
    ARITHMETICS,
    Arithmetic,
    Cuts,
    Features,
    Need,
    Trace,
    check_arithmetic,
    needed,
    settings_of,
)
from pruning.spec import PruneSpec

NAME = "uniform"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """No constants: grid and number of kept tokens say everything."""


class Uniform:
    """Cuts the N tokens, row by row, into `keep` stretches as equal as whole tokens allow; keeps the middle of each."""

    name = NAME
    needs: frozenset[Need] = frozenset()
    cuts = Cuts()
    arithmetics = ARITHMETICS
    settings = Settings

    def choose(self, features: Features, spec: PruneSpec) -> Trace:
        """(B, N, D) -> kept tokens (B, keep, D) as they are."""
        kept = _middles(spec)
        hidden = needed(features, spec, self.needs).hidden
        return fixed_trace(hidden[:, kept], kept, order=kept)

    def module(self, spec: PruneSpec, arithmetic: Arithmetic) -> nn.Module:
        """Builds the static form: one product with a constant matrix."""
        check_arithmetic(arithmetic, self)
        kept = _middles(spec)
        return FixedChoice(spec, arithmetic, kept=kept, mix=one_hot(kept, spec.tokens))


def _middles(spec: PruneSpec) -> list[int]:
    settings_of(spec, NAME, Settings)
    return [(2 * i + 1) * spec.tokens // (2 * spec.keep) for i in range(spec.keep)]


UNIFORM = Uniform()
