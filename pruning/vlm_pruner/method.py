"""VLM-Pruner (arXiv 2512.02700) as a method: the paper's loop, and a static form for each arithmetic."""

from __future__ import annotations

from torch import Tensor, nn

from pruning.method import ARITHMETICS, Arithmetic, Cuts, Features, Kept, Need, Trace, check_arithmetic
from pruning.spec import PruneSpec, SpecError
from pruning.vlm_pruner import reference
from pruning.vlm_pruner.comparing import ComparingPruner
from pruning.vlm_pruner.settings import NAME, Settings
from pruning.vlm_pruner.static import TokenPruner

FORMS: dict[Arithmetic, type[TokenPruner | ComparingPruner]] = {"float32": TokenPruner, "float16": ComparingPruner}


class VlmPruner:
    """Pivots far from each other, then centrifugal expansion, then recovery of what was dropped.

    The paper prunes inside the decoder. Behind the projector the keys of the tower's last layer stand for those of the
    decoder layer before the cut.
    """

    name = NAME
    needs: frozenset[Need] = frozenset({"keys"})
    cuts = Cuts()
    arithmetics = ARITHMETICS
    settings = Settings

    def choose(self, features: Features, spec: PruneSpec) -> Trace:
        """Runs the paper's algorithm 1. Arithmetic is float32, or float64 for float64 features."""
        return reference.trace(_keys(features), features.hidden, spec)

    def module(self, spec: PruneSpec, arithmetic: Arithmetic) -> nn.Module:
        """Builds the static form for engines that compute in `arithmetic`; SpecError for a spec beyond it."""
        check_arithmetic(arithmetic, self)
        return _Selecting(FORMS[arithmetic](spec))


class _Selecting(nn.Module):
    """A form of the pruner behind the interface that all methods share."""

    def __init__(self, form: TokenPruner | ComparingPruner) -> None:
        super().__init__()
        self.form = form

    def forward(self, features: Features) -> Kept:
        """keys (B, N, Dk), hidden (B, N, D) -> tokens (B, keep, D), indices (B, keep), filled (B, 1)"""
        return Kept(*self.form.select(_keys(features), features.hidden))


def _keys(features: Features) -> Tensor:
    if features.keys is None:
        raise SpecError(f"method {NAME!r} needs keys, and the features hold none")
    return features.keys


VLM_PRUNER = VlmPruner()
