"""HoloV, arXiv 2510.02912: a quota for every part of the image, so that no bright spot takes all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning import oracle
from pruning.arithmetic import COARSE, HUGE, outer_difference
from pruning.chooser import Chooser, apart
from pruning.method import Arithmetic, Cuts, Features, Need, Trace, check_arithmetic, needed, settings_of
from pruning.spec import PruneSpec, SpecError, is_count

NAME = "holov"
NEEDS: frozenset[Need] = frozenset({"attention"})
MOST_CROPS = 256
SLACK = 2.0**-10  # a quota this little below a whole number is that: equal crops get equal quotas in any arithmetic
LEAST_VARIANCE = 1e-6  # added to a crop's mean variance before it divides
LEAST_SCORE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The constants of HoloV, as its published code has them.

    Attributes:
        crops: stretches of consecutive tokens that get a quota each (fewer where there are fewer tokens).
        variance_weight: weight of the variance of similarities beside the attention.

    Raises:
        SpecError: a value outside its range.
    """

    crops: int = 16
    variance_weight: float = 0.09

    def __post_init__(self) -> None:
        if not is_count(self.crops) or self.crops > MOST_CROPS:
            raise SpecError(f"crops={self.crops!r} must be a whole number in 1..{MOST_CROPS}")
        value = self.variance_weight
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 100.0:
            raise SpecError(f"variance_weight={value!r} must be a number in 0..100")
        object.__setattr__(self, "variance_weight", float(value))

    def sizes(self, tokens: int) -> list[int]:
        """Lengths of the stretches, as equal as whole numbers allow, the first ones longer."""
        crops = min(self.crops, tokens)
        return [tokens // crops + (at < tokens % crops) for at in range(crops)]


class HoloV:
    """Keeps the best tokens of each crop of the image ([arXiv 2510.02912](https://arxiv.org/abs/2510.02912)).

    A token's score is the class token's attention, plus the variance of its similarities within the crop, scaled to the
    crop's mean attention. A crop's quota follows its mean score; what rounding leaves goes to the crops of the largest,
    one token each, and what a full crop leaves to the best tokens anywhere. The published code is followed, crops of
    consecutive tokens included, but for two things: within a crop it ranks by attention alone, so that the variance
    decides nothing, where here the score does; and where a quota exceeds its crop it pads with zeros.
    """

    name = NAME
    needs = NEEDS
    cuts = Cuts(most=0)
    arithmetics: tuple[Arithmetic, ...] = ("float32",)
    settings = Settings

    def choose(self, features: Features, spec: PruneSpec) -> Trace:
        """attention (B, N), hidden (B, N, D) -> tokens (B, keep, D) as they are."""
        settings = settings_of(spec, NAME, Settings)
        given = needed(features, spec, NEEDS)
        assert given.attention is not None
        distances = [oracle.apart(unit, unit) for unit in map(oracle.units, oracle.precise(given.hidden))]
        attention = oracle.precise(given.attention) * float(spec.tokens)
        choices = [_choose_one(*image, spec.keep, settings) for image in zip(attention, distances, strict=True)]
        return oracle.trace_of(given.hidden, choices, [1.0 - distance for distance in distances])

    def module(self, spec: PruneSpec, arithmetic: Arithmetic) -> nn.Module:
        """Builds the static form: a ranking of tokens, one of crops, and a last one of what is still missing."""
        settings = settings_of(spec, NAME, Settings)
        check_arithmetic(arithmetic, self)
        return _Quotas(spec, settings)


def _choose_one(attention: Tensor, distance: Tensor, keep: int, settings: Settings) -> oracle.Choice:
    sizes = settings.sizes(len(attention))
    scores, starts, at = [], [], 0
    for size in sizes:
        inside = slice(at, at + size)
        starts.append(at)
        at += size
        scores.append(_scores(attention[inside], 1.0 - distance[inside, inside], settings.variance_weight))
    means = torch.stack([score.mean() for score in scores])
    wanted = means / means.sum().clamp(min=LEAST_SCORE) * float(keep)
    quotas = (wanted + SLACK).floor().long().tolist()
    over = keep - sum(quotas)
    for crop in (means + COARSE).sort(descending=True, stable=True).indices[: max(over, 0)].tolist():
        quotas[crop] += 1
    free = torch.ones(len(attention), dtype=torch.bool)
    score = torch.cat(scores) + COARSE
    order: list[int] = []
    margin: list[float] = []

    def take(count: int, among: Tensor) -> None:
        added = []
        for _ in range(min(count, int(among.sum()))):
            best, _ = oracle.best_free(score, among)
            added.append(best)
            free[best] = among[best] = False
        left = float(score[among].max()) if bool(among.any()) else -torch.inf
        order.extend(added)
        margin.extend(float(score[token]) - left for token in added)

    for start, size, quota in zip(starts, sizes, quotas, strict=True):
        crop = torch.zeros_like(free)
        crop[start : start + size] = True
        take(quota, crop)
    take(keep - len(order), free.clone())
    return oracle.Choice(order, margin, [])


def _scores(attention: Tensor, similarity: Tensor, weight: float) -> Tensor:
    """Attention and the variance of similarities to the others of a crop: (n,), (n, n) -> (n,)."""
    size = len(attention)
    if size == 1:
        return attention
    others = similarity * (1.0 - torch.eye(size))
    mean = others.sum(1, keepdim=True) / (size - 1)
    variance = (others - mean).square().sum(1) / (size - 1)  # with a 0 for the token itself, as published
    return attention + weight * variance * (attention.mean() / (variance.mean() + LEAST_VARIANCE))


class _Quotas(Chooser):
    """Scores tokens within crops of constant shape, counts out quotas, and fills up by rank."""

    others: Tensor
    within: Tensor
    per_other: Tensor
    mean_of: Tensor
    of_crop: Tensor
    whole: Tensor
    crop_tie: Tensor

    def __init__(self, spec: PruneSpec, settings: Settings) -> None:
        super().__init__(spec, NEEDS)
        sizes = torch.tensor(settings.sizes(spec.tokens))
        self.weight, self.crops = settings.variance_weight, len(sizes)
        crop = torch.arange(self.crops).repeat_interleave(sizes)
        of_crop = torch.nn.functional.one_hot(crop, self.crops).float()
        within = of_crop @ of_crop.T
        at = torch.arange(self.crops)
        self.constants(
            others=(within - torch.eye(spec.tokens))[None],
            within=within[None],
            per_other=(1.0 / (sizes - 1).clamp(min=1).float())[crop][None, :, None],
            mean_of=(of_crop / sizes).T[None],
            of_crop=of_crop[None],
            whole=torch.arange(1, spec.keep + 1).float()[None, None],
            crop_tie=(at[None, :] < at[:, None]).float()[None],
        )

    def decided(self, features: Features) -> tuple[Tensor, None]:
        assert features.attention is not None
        images = len(features.hidden)
        score = self._scores(features.attention.view(images, -1, 1) * float(self.spec.tokens), features.hidden)
        mean = torch.bmm(self.many(self.mean_of, images), score)  # (B, crops, 1)
        quota = self._quotas(mean)
        before = self.before((score + COARSE).view(images, 1, -1))
        place = self.total(before * self.within)
        taken = (torch.bmm(self.many(self.of_crop, images), quota) - place).clamp(0.0, 1.0)
        # Taken ones come first whatever their score.
        return self.first((outer_difference(taken * 2.0) + before).clamp(0.0, 1.0)), None

    def _scores(self, attention: Tensor, hidden: Tensor) -> Tensor:
        """Columns of attention -> of scores."""
        images, unit = len(hidden), self.unit(hidden)
        others = (1.0 - apart(unit, unit)) * self.others
        mean = self.total(others) * self.per_other
        away = (others - mean) * self.within
        variance = self.total(away * away) * self.per_other
        mean_of, of_crop = self.many(self.mean_of, images), self.many(self.of_crop, images)
        scale = torch.bmm(mean_of, attention) / (torch.bmm(mean_of, variance) + LEAST_VARIANCE)
        return attention + variance * torch.bmm(of_crop, scale) * self.weight

    def _quotas(self, mean: Tensor) -> Tensor:
        """How many tokens of each crop stay: (B, crops, 1) -> (B, crops, 1)."""
        images = len(mean)
        together = self.total(mean.view(images, 1, self.crops)).clamp(min=LEAST_SCORE)
        wanted = mean / together * float(self.spec.keep) + SLACK
        # A whole number is reached where the difference is not negative.
        whole = self.total(((wanted - self.whole) * HUGE + 1.0).clamp(0.0, 1.0))
        over = float(self.spec.keep) - self.total(whole.view(images, 1, self.crops))
        ahead = (outer_difference(mean + COARSE) * HUGE + self.crop_tie).clamp(0.0, 1.0)
        return whole + (over - self.total(ahead)).clamp(0.0, 1.0)


HOLOV = HoloV()
