"""FastV, arXiv 2403.06764: the image tokens that the question looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pruning import oracle
from pruning.method import Arithmetic, Cuts, Features, Need, Trace, needed, settings_of
from pruning.spec import PruneSpec, SpecError

NAME = "fastv"
NEEDS: frozenset[Need] = frozenset({"attention", "question"})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """No constants: the number of kept tokens says everything."""


class FastV:
    """Keeps what the question's last token looks at most; only in Python, because no export knows the question.

    The attention is the mean over heads in the decoder layer in front of the cut
    ([arXiv 2403.06764](https://arxiv.org/abs/2403.06764), which cuts at layer 2). A photo is pruned and prefilled
    before anybody asks about it, so that a bundle cannot hold this one: it is here to be compared with.
    """

    name = NAME
    needs = NEEDS
    cuts = Cuts(least=1)
    arithmetics: tuple[Arithmetic, ...] = ()
    settings = Settings

    def choose(self, features: Features, spec: PruneSpec) -> Trace:
        """attention (B, N) of the question, hidden (B, N, D) -> tokens (B, keep, D) as they are."""
        settings_of(spec, NAME, Settings)
        given = needed(features, spec, NEEDS)
        assert given.attention is not None
        choices = []
        for score in oracle.precise(given.attention):
            free = torch.ones(spec.tokens, dtype=torch.bool)
            picked = []
            for _ in range(spec.keep):
                picked.append(oracle.best_free(score, free))
                free[picked[-1][0]] = False
            choices.append(oracle.Choice([token for token, _ in picked], [lead for _, lead in picked], []))
        units = [oracle.units(image) for image in oracle.precise(given.hidden)]
        return oracle.trace_of(given.hidden, choices, [1.0 - oracle.apart(unit, unit) for unit in units])

    def module(self, spec: PruneSpec, arithmetic: Arithmetic) -> nn.Module:
        """Refuses: SpecError."""
        raise SpecError(
            f"method {NAME!r} chooses by the question, and a graph of the image has none; call its choose()"
        )


FASTV = FastV()
