"""Tokens drawn by chance, whatever they hold: a baseline that is hard to beat when few questions are asked."""

from __future__ import annotations

import random
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
from pruning.spec import PruneSpec, SpecError

NAME = "random"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The constant of the draw.

    Attributes:
        seed: of the permutation, a whole number of at least 0.

    Raises:
        SpecError: another value.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise SpecError(f"seed={self.seed!r} must be a whole number of at least 0")


class Random:
    """Keeps the first `keep` tokens of a seeded permutation, the same for every image; a larger `keep` adds tokens."""

    name = NAME
    needs: frozenset[Need] = frozenset()
    cuts = Cuts()
    arithmetics = ARITHMETICS
    settings = Settings

    def choose(self, features: Features, spec: PruneSpec) -> Trace:
        """(B, N, D) -> kept tokens (B, keep, D) as they are."""
        order = _drawn(spec)
        hidden = needed(features, spec, self.needs).hidden
        kept = sorted(order)
        return fixed_trace(hidden[:, kept], kept, order=order)

    def module(self, spec: PruneSpec, arithmetic: Arithmetic) -> nn.Module:
        """Builds the static form: one product with a constant matrix."""
        check_arithmetic(arithmetic, self)
        kept = sorted(_drawn(spec))
        return FixedChoice(spec, arithmetic, kept=kept, mix=one_hot(kept, spec.tokens))


def _drawn(spec: PruneSpec) -> list[int]:
    """The permutation by which numbers, drawn one for each token, ascend: Python promises the same ones everywhere."""
    chance = random.Random(settings_of(spec, NAME, Settings).seed)
    drawn = [chance.random() for _ in range(spec.tokens)]
    return sorted(range(spec.tokens), key=drawn.__getitem__)[: spec.keep]


RANDOM = Random()
