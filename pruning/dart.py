"""DART, arXiv 2502.11494: a few pivots, and the tokens that are least like each of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning import oracle
from pruning.chooser import Chooser, apart
from pruning.method import Arithmetic, Cuts, Features, Need, Trace, check_arithmetic, needed, settings_of
from pruning.spec import PruneSpec, SpecError, is_count

NAME = "dart"
NEEDS: frozenset[Need] = frozenset({"keys"})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The constants of DART.

    Attributes:
        pivots: image tokens that the others are compared with (fewer when fewer tokens stay).

    Raises:
        SpecError: a value outside its range.
    """

    pivots: int = 4

    def __post_init__(self) -> None:
        if not is_count(self.pivots):
            raise SpecError(f"pivots={self.pivots!r} must be a whole number of at least 1")

    def shares(self, keep: int) -> list[int]:
        """How many tokens each pivot adds: as equal as whole numbers allow, the first ones more."""
        pivots = min(self.pivots, keep)
        rest = keep - pivots
        return [rest // pivots + (at < rest % pivots) for at in range(pivots)]


class Dart:
    """Keeps pivots and what duplicates them least ([arXiv 2502.11494](https://arxiv.org/abs/2502.11494)).

    Pivots are the tokens whose keys have the largest L1 norm. One after the other, from the largest on, adds its share
    of the tokens left whose hidden states are least like its own in cosine. The paper takes four pivots of the image
    and four of the question; nobody has asked yet when the photo is pruned, so that here the image's are all, with
    twice the share. The cosine is of what enters the cut, where the published code puts the decoder's last norm first.
    """

    name = NAME
    needs = NEEDS
    cuts = Cuts(least=1)
    arithmetics: tuple[Arithmetic, ...] = ("float32",)
    settings = Settings

    def choose(self, features: Features, spec: PruneSpec) -> Trace:
        """keys (B, N, Dk), hidden (B, N, D) -> tokens (B, keep, D) as they are; pivots are the marks."""
        settings = settings_of(spec, NAME, Settings)
        given = needed(features, spec, NEEDS)
        assert given.keys is not None
        distances = [oracle.apart(unit, unit) for unit in map(oracle.units, oracle.precise(given.hidden))]
        norms = oracle.precise(given.keys).abs().sum(-1)
        shares = settings.shares(spec.keep)
        choices = [_choose_one(norm, distance, shares) for norm, distance in zip(norms, distances, strict=True)]
        return oracle.trace_of(given.hidden, choices, [1.0 - distance for distance in distances])

    def module(self, spec: PruneSpec, arithmetic: Arithmetic) -> nn.Module:
        """Builds the static form: a ranking for each pivot."""
        settings = settings_of(spec, NAME, Settings)
        check_arithmetic(arithmetic, self)
        return _LeastAlike(spec, settings.shares(spec.keep))


def _choose_one(norm: Tensor, distance: Tensor, shares: list[int]) -> oracle.Choice:
    free = torch.ones(len(norm), dtype=torch.bool)
    order: list[int] = []
    margin: list[float] = []
    for _ in shares:
        best, lead = oracle.best_free(norm, free)
        order.append(best)
        margin.append(lead / max(float(norm[best]), 1e-30))
        free[best] = False
    pivots = list(order)
    for pivot, share in zip(pivots, shares, strict=True):
        added = []
        for _ in range(share):
            best, _ = oracle.best_free(distance[pivot], free)
            added.append(best)
            free[best] = False
        left = float(distance[pivot, free].max()) if bool(free.any()) else -torch.inf
        order += added
        margin += [float(distance[pivot, token]) - left for token in added]
    return oracle.Choice(order, margin, pivots)


class _LeastAlike(Chooser):
    """Pivots by the norm of their keys, then for each the tokens left that are farthest from it."""

    def __init__(self, spec: PruneSpec, shares: list[int]) -> None:
        super().__init__(spec, NEEDS)
        self.added = shares

    def decided(self, features: Features) -> tuple[Tensor, None]:
        assert features.keys is not None
        images = len(features.hidden)
        norm = self.total(features.keys.abs()).view(images, 1, -1)
        pivots = [self.newest(norm)]
        selected = pivots[0]
        for _ in self.added[1:]:
            pivots.append(self.newest(norm, selected))
            selected = selected + pivots[-1]
        if max(self.added):
            unit = self.unit(features.hidden)
            from_pivots = apart(torch.bmm(torch.cat(pivots, 1), unit), unit)  # (B, pivots, N)
        for at, share in enumerate(self.added):
            if not share:
                break
            score = from_pivots[:, at : at + 1] * (1.0 - selected) - selected
            place = self.total(self.before(score)).view(images, 1, -1)
            selected = selected + (float(share) - place).clamp(0.0, 1.0)
        return self.column(selected), None


DART = Dart()
