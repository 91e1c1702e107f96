"""VLM-Pruner (arXiv 2512.02700) as a method: the loop, a static form for each arithmetic, and what ablates it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn

from pruning.method import (
    ARITHMETICS,
    Arithmetic,
    Cuts,
    Features,
    Kept,
    Need,
    Trace,
    check_arithmetic,
    needed,
    settings_of,
)
from pruning.spec import PruneSpec
from pruning.vlm_pruner import reference
from pruning.vlm_pruner.comparing import ComparingPruner
from pruning.vlm_pruner.settings import NAME, Settings
from pruning.vlm_pruner.static import TokenPruner

NEEDS: frozenset[Need] = frozenset({"keys"})
FORMS: dict[Arithmetic, type[TokenPruner | ComparingPruner]] = {"float32": TokenPruner, "float16": ComparingPruner}


class VlmPruner:
    """Pivots far from each other, then centrifugal expansion, then recovery of what was dropped.

    The paper ([arXiv 2512.02700](https://arxiv.org/abs/2512.02700)) prunes inside the decoder. Behind the projector the
    keys of the tower's last layer stand for those of the decoder layer before the cut.
    """

    name = NAME
    needs = NEEDS
    cuts = Cuts()
    arithmetics = ARITHMETICS
    settings: type[Settings] = Settings

    def choose(self, features: Features, spec: PruneSpec) -> Trace:
        """Runs the paper's algorithm 1. Arithmetic is float32, or float64 for float64 features."""
        keys, hidden = _looked_at(features, spec)
        return reference.trace(keys, hidden, self._own(spec))

    def module(self, spec: PruneSpec, arithmetic: Arithmetic) -> nn.Module:
        """Builds the static form for engines that compute in `arithmetic`; SpecError for a spec beyond it."""
        check_arithmetic(arithmetic, self)
        return _Selecting(FORMS[arithmetic](self._own(spec)), spec)

    def _own(self, spec: PruneSpec) -> PruneSpec:
        """What is asked of this method as asked of the paper's, which differs in constants alone."""
        return dataclasses.replace(spec, method=NAME, settings=settings_of(spec, self.name, self.settings))


@dataclass(frozen=True, kw_only=True)
class EvenSettings(Settings):
    """The constants of VLM-Pruner with a distance that weighs nothing."""

    distance_weight: float = 0.0


class WithoutBss(VlmPruner):
    """VLM-Pruner without its buffering for spatial sparsity: how far tokens are on the grid counts nothing."""

    name = "vlm-pruner-no-bss"
    settings = EvenSettings


@dataclass(frozen=True, kw_only=True)
class DroppingSettings(Settings):
    """The constants of VLM-Pruner with a recovery that mixes nothing."""

    recovery: float = 0.0


class WithoutRecovery(VlmPruner):
    """VLM-Pruner without its recovery: the same tokens stay, as they are, and what was dropped is lost."""

    name = "vlm-pruner-no-recovery"
    settings = DroppingSettings


@dataclass(frozen=True, kw_only=True)
class NormSettings(Settings):
    """The constants of VLM-Pruner with four pivots by the norm."""

    norm_pivots: int = 4


class NormPivots(VlmPruner):
    """VLM-Pruner with its four pivots by the largest norm of their keys, however near to each other they are."""

    name = "vlm-pruner-norm-pivots"
    settings = NormSettings


class _Selecting(nn.Module):
    """A form of the pruner behind the interface that all methods share."""

    def __init__(self, form: TokenPruner | ComparingPruner, spec: PruneSpec) -> None:
        super().__init__()
        self.form, self.spec = form, spec

    def forward(self, features: Features) -> Kept:
        """keys (B, N, Dk), hidden (B, N, D) -> tokens (B, keep, D), indices (B, keep), filled (B, 1)"""
        keys, hidden = _looked_at(features, self.spec)
        return Kept(*self.form.select(keys, hidden))


def _looked_at(features: Features, spec: PruneSpec) -> tuple[Tensor, Tensor]:
    """Keys and hidden states."""
    given = needed(features, spec, NEEDS)
    assert given.keys is not None
    return given.keys, given.hidden


VLM_PRUNER = VlmPruner()
NO_BSS = WithoutBss()
NO_RECOVERY = WithoutRecovery()
NORM_PIVOTS = NormPivots()
