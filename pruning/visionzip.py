"""VisionZip, arXiv 2412.04467: the tokens that the class token looks at, and a few that stand for all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning import oracle
from pruning.arithmetic import equal, first_largest
from pruning.chooser import Chooser, apart
from pruning.method import Arithmetic, Cuts, Features, Need, Trace, check_arithmetic, needed, settings_of
from pruning.spec import PruneSpec, SpecError

NAME = "visionzip"
NEEDS: frozenset[Need] = frozenset({"attention", "keys"})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The constants of VisionZip.

    Attributes:
        contextual: share of the kept tokens that stand for others; the paper's splits are 54 + 10, 108 + 20, 162 + 30.

    Raises:
        SpecError: a value outside its range.
    """

    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        value = self.contextual
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
            raise SpecError(f"contextual={value!r} must be a number in 0..1")
        object.__setattr__(self, "contextual", float(value))

    def targets(self, keep: int) -> int:
        """Counts the tokens that stand for others, rounded to the nearest whole number."""
        return round(self.contextual * keep)


class VisionZip:
    """Keeps what the class token looks at, and merges the rest ([arXiv 2412.04467](https://arxiv.org/abs/2412.04467)).

    The tokens of most attention in the tower's last layer stay as they are. Of the rest, evenly spaced ones become
    means: each other one goes to that whose keys are most similar in cosine. Both happen in front of the projector in
    the paper; here behind it, on its outputs, with every token at its own position. The published code keeps the class
    token too, which the decoder is not given here; it averages keys over heads, of which a method knows no number, so
    that here they stand side by side; and it adds the mean of what is merged to a token, which would double its length,
    where here one mean of all of them is taken.
    """

    name = NAME
    needs = NEEDS
    cuts = Cuts(most=0)
    arithmetics: tuple[Arithmetic, ...] = ("float32",)
    settings = Settings

    def choose(self, features: Features, spec: PruneSpec) -> Trace:
        """attention (B, N), keys (B, N, Dk), hidden (B, N, D) -> tokens (B, keep, D); those of means are the marks."""
        settings = settings_of(spec, NAME, Settings)
        given = needed(features, spec, NEEDS)
        assert given.attention is not None
        assert given.keys is not None
        images = zip(oracle.shares(oracle.precise(given.attention)), oracle.precise(given.keys), strict=True)
        choices, mixes = zip(*(_choose_one(*image, spec.keep, settings) for image in images), strict=True)
        order = torch.tensor([choice.order for choice in choices])
        mix = torch.stack(mixes).to(oracle.precise(given.hidden).dtype)
        return Trace(
            tokens=(mix @ oracle.precise(given.hidden)).to(given.hidden.dtype),
            indices=order.sort().values,
            order=order,
            margin=torch.tensor([choice.margin for choice in choices], dtype=torch.float32),
            marks=torch.tensor([choice.marks for choice in choices], dtype=torch.int64).view(len(choices), -1),
            mix=mix,
        )

    def module(self, spec: PruneSpec, arithmetic: Arithmetic) -> nn.Module:
        """Builds the static form: one ranking, and one look for the most similar."""
        settings = settings_of(spec, NAME, Settings)
        check_arithmetic(arithmetic, self)
        return _DominantAndMerged(spec, settings.targets(spec.keep))


def _choose_one(share: Tensor, keys: Tensor, keep: int, settings: Settings) -> tuple[oracle.Choice, Tensor]:
    """The choice and the matrix (keep, N) that makes its tokens."""
    count, targets = len(share), settings.targets(keep)
    free = torch.ones(count, dtype=torch.bool)
    order: list[int] = []
    for _ in range(keep - targets):
        best, _ = oracle.best_free(share, free)
        order.append(best)
        free[best] = False
    left = torch.nonzero(free).flatten()
    least = float(share[left].max()) if len(left) else -torch.inf
    margin = [float(share[token]) - least for token in order]
    step = max(1, len(left) // targets) if targets else 1
    standing = left[::step][:targets]
    mix = torch.zeros(count, count)
    mix[order, order] = 1.0
    if targets:
        unit = oracle.units(keys)
        nearest = standing[oracle.apart(unit[left], unit[standing]).argmin(1)]
        for token, target in zip(left.tolist(), nearest.tolist(), strict=True):
            mix[token if token in standing else target, token] = 1.0
    kept = sorted([*order, *standing.tolist()])
    mix = mix[kept] / mix[kept].sum(1, keepdim=True)
    choice = oracle.Choice(order + standing.tolist(), margin + [torch.inf] * targets, standing.tolist())
    return choice, mix


class _DominantAndMerged(Chooser):
    """Ranks by attention, counts through the rest for targets, and brings every other token to one."""

    target_places: Tensor
    same: Tensor

    def __init__(self, spec: PruneSpec, targets: int) -> None:
        super().__init__(spec, NEEDS)
        self.dominant, self.targets = spec.keep - targets, targets
        step = max(1, (spec.tokens - self.dominant) // max(1, targets))
        self.constants(same=torch.eye(spec.tokens)[None])
        if targets:
            self.constants(target_places=torch.arange(targets).float()[None, None] * float(step))

    def decided(self, features: Features) -> tuple[Tensor, Tensor | None]:
        assert features.attention is not None
        assert features.keys is not None
        place = self.total(self.before(self.shares(features.attention)))
        images = len(place)
        dominant = (float(self.dominant) - place).clamp(0.0, 1.0)
        if not self.targets:
            return dominant, None
        rest = 1.0 - dominant
        place_left = torch.bmm(self.many(self.tie, images), rest)
        targets = equal(place_left, self.target_places) * rest  # one-hot columns (B, N, targets)
        standing = self.total(targets)
        unit = self.unit(features.keys)
        distance = apart(unit, torch.bmm(targets.transpose(1, 2), unit))
        goes_to = first_largest(-distance, self.places[:, :, : self.targets])
        group = targets + goes_to * (rest - standing)
        weight = group.transpose(1, 2)
        means = torch.bmm(targets, weight / self.total(weight))
        return dominant + standing, self.many(self.same, images) * dominant + means


VISIONZIP = VisionZip()
