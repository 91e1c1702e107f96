"""DivPrune, arXiv 2503.02175: the tokens that are farthest apart, found one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruning import oracle
from pruning.chooser import FAR, Chooser, apart
from pruning.method import Arithmetic, Cuts, Features, Need, Trace, check_arithmetic, needed, settings_of
from pruning.spec import PruneSpec

NAME = "divprune"
NEEDS: frozenset[Need] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """No constants: the number of kept tokens says everything."""


class DivPrune:
    """Keeps tokens far apart in cosine distance ([arXiv 2503.02175](https://arxiv.org/abs/2503.02175)).

    The first is the one whose nearest other token is farthest, each next the one farthest from all chosen so far. The
    paper prunes behind the projector; in the decoder the same is done with the hidden states in front of the cut.
    Chosen tokens are never chosen again; in the published code they can be, where all others are their copies.
    """

    name = NAME
    needs = NEEDS
    cuts = Cuts()
    arithmetics: tuple[Arithmetic, ...] = ("float32",)
    settings = Settings

    def choose(self, features: Features, spec: PruneSpec) -> Trace:
        """Solves the paper's max-min diversity problem greedily: (B, N, D) -> tokens (B, keep, D) as they are."""
        settings_of(spec, NAME, Settings)
        hidden = needed(features, spec, NEEDS).hidden
        distances = [oracle.apart(unit, unit) for unit in map(oracle.units, oracle.precise(hidden))]
        choices = [oracle.farthest(_from_others(distance), distance, spec.keep) for distance in distances]
        return oracle.trace_of(hidden, choices, [1.0 - distance for distance in distances])

    def module(self, spec: PruneSpec, arithmetic: Arithmetic) -> nn.Module:
        """Builds the static form: a step for each token to keep."""
        settings_of(spec, NAME, Settings)
        check_arithmetic(arithmetic, self)
        return _Farthest(spec)


def _from_others(distance: Tensor) -> Tensor:
    """How far the nearest other token is: (N, N) -> (N,)"""
    return (distance + FAR * torch.eye(len(distance))).min(1).values


class _Farthest(Chooser):
    """A farthest-point step for each token to keep."""

    itself: Tensor

    def __init__(self, spec: PruneSpec) -> None:
        super().__init__(spec, NEEDS)
        self.constants(itself=FAR * torch.eye(spec.tokens)[None])

    def decided(self, features: Features) -> tuple[Tensor, None]:
        unit, count = self.unit(features.hidden), self.spec.tokens
        distance = apart(unit, unit)
        images = len(distance)
        if count == 1:
            return distance * 0.0 + 1.0, None
        nearness = -(distance + self.itself)
        nearest_other = functional.max_pool2d(nearness.view(images, count, count, 1), (count, 1), stride=(count, 1))
        return self.farthest(-nearest_other.view(images, 1, count), distance), None


DIVPRUNE = DivPrune()
