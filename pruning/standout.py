"""Our own method: tokens that stand out from the image's mean and from each other, and the rest recovered into them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning import oracle
from pruning.arithmetic import COARSE, LEAST_NORM, product
from pruning.chooser import Chooser, apart
from pruning.method import Arithmetic, Cuts, Features, Need, Trace, check_arithmetic, needed, settings_of
from pruning.recovery import recovering
from pruning.spec import PruneSpec, SpecError

NAME = "standout"
NEEDS: frozenset[Need] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The constants of this method.

    Attributes:
        recovery: share of a kept token that is replaced by the tokens it stands for.

    Raises:
        SpecError: a value outside its range.
    """

    recovery: float = 0.5

    def __post_init__(self) -> None:
        value = self.recovery
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
            raise SpecError(f"recovery={value!r} must be a number in 0..1")
        object.__setattr__(self, "recovery", float(value))


class Standout:
    """Keeps tokens that stand out from the image and from each other; our own, and nothing is asked for.

    A token's weight is the root of how far its hidden state is from the mean of all, in shares of the average. The
    first is the heaviest, each next the one whose weight times its cosine distance from all chosen so far is largest:
    plain background is near the mean, so that little of it is taken. Each dropped token is then mixed into its most
    similar kept one, as VLM-Pruner recovers.
    """

    name = NAME
    needs = NEEDS
    cuts = Cuts()
    arithmetics: tuple[Arithmetic, ...] = ("float32",)
    settings = Settings

    def choose(self, features: Features, spec: PruneSpec) -> Trace:
        """Solves the weighted max-min problem greedily: (B, N, D) -> tokens (B, keep, D), mixed."""
        settings = settings_of(spec, NAME, Settings)
        hidden = needed(features, spec, NEEDS).hidden
        images = list(oracle.precise(hidden))
        distances = [oracle.apart(unit, unit) for unit in map(oracle.units, images)]
        weighted = zip(map(_weights, images), distances, strict=True)
        choices = [oracle.farthest(weight, distance, spec.keep, weight) for weight, distance in weighted]
        return oracle.trace_of(hidden, choices, [1.0 - d for d in distances], share=settings.recovery)

    def module(self, spec: PruneSpec, arithmetic: Arithmetic) -> nn.Module:
        """Builds the static form: a step for each token to keep, and one look for the most similar."""
        settings = settings_of(spec, NAME, Settings)
        check_arithmetic(arithmetic, self)
        return _StandingOut(spec, settings.recovery)


def _weights(hidden: Tensor) -> Tensor:
    """The root of how far each token is from the mean, in shares of the average: (N, D) -> (N,), multiples of 2^-20."""
    away = (hidden - hidden.mean(0)).square().sum(1).sqrt()
    return (away / away.mean().clamp(min=LEAST_NORM)).sqrt() + COARSE - COARSE


class _StandingOut(Chooser):
    """A weighted farthest-point step for each token to keep."""

    mean: Tensor

    def __init__(self, spec: PruneSpec, recovery: float) -> None:
        super().__init__(spec, NEEDS)
        self.recovery = recovery
        self.constants(mean=torch.full((1, 1, spec.tokens), 1.0 / spec.tokens))

    def decided(self, features: Features) -> tuple[Tensor, Tensor]:
        hidden = features.hidden
        images, mean = len(hidden), self.many(self.mean, len(hidden))
        away = hidden - torch.bmm(mean, hidden)
        far = product(away * away, self.many(self.ones[:, : hidden.shape[2]], images)).sqrt()  # (B, N, 1)
        weight = (far / torch.bmm(mean, far).clamp(min=LEAST_NORM)).sqrt() + COARSE - COARSE
        weight = weight.view(images, 1, -1)
        unit = self.unit(hidden)
        distance = apart(unit, unit)
        return self.farthest(weight, distance, weight), 1.0 - distance

    def mix(self, pick: Tensor, chosen: Tensor, becomes: Tensor | None) -> Tensor:
        """Dropped tokens go into kept ones, by their similarity `becomes`."""
        assert becomes is not None
        if not self.recovery:
            return pick
        ones, places = self.many(self.ones[:, : self.spec.tokens], len(pick)), self.places[:, :, : self.spec.keep]
        return recovering(becomes, chosen, pick, self.recovery, ones=ones, places=places)


STANDOUT = Standout()
