"""VLM-Pruner with static shapes for engines that compute in float16 and can compare, such as a Snapdragon's NPU.

The other static form tells numbers apart by multiplying their differences with 2^60, which float16 cannot hold. Here
comparisons, selects and the smallest of a row do that work. Every count and place is a whole number that float16 holds.

Float16 has 11 bits, and the choices turn on the 17th. The numbers that decide are therefore pairs: the nearest float16
and what it leaves. Engines add up the terms of a product in float32 and round the total, so a second product that holds
the same terms and the first total, negative, gives the rest. What only has to be brought into range is multiplied by
powers of two, which rounds nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pruning.reference import CANCELLATION, check_features, check_shapes, squared_distances
from pruning.spec import RANK_EVERY, PruneSpec, SpecError

BEYOND = 16384.0  # above every place and score, and far from float16's largest number
MOST_TOKENS = 1024  # places and halves between them are exact in float16 up to here
LEAST = 2.0**-13  # smaller divisors are no longer precise in float16
UNIT = 1024.0  # distances and scores are kept times this, so that their rests stay above float16's smallest numbers
GRAIN = 1024.0  # rests are whole multiples of 1 / GRAIN: what differs by less is float32's noise, and ties
MOST_COUNTED = 2047  # levels and channels are counted up to here
SMALLEST, LARGEST = -10, 14  # as powers of two, between which sizes are brought near 1
BIASED = 4.0  # deviations from zero, from which on a channel's mean is taken out before squares are added up
LONGEST = 64.0  # what the longest key is shortened to, so that no squared distance reaches BEYOND


class _Pair(NamedTuple):
    """Numbers as the nearest ones that the dtype holds, and what these leave.

    The rest is at most half of the last place, so of two numbers the one with the larger `near` is larger, and where
    these are equal the one with the larger `rest`. In float32 it is nothing but noise, and rounded away.
    """

    near: Tensor
    rest: Tensor

    def exceeds(self, other: _Pair) -> Tensor:
        """True where larger than the other, with broadcasting."""
        return (self.near > other.near) | ((self.near == other.near) & (self.rest > other.rest))

    def least(self, dim: int) -> _Pair:
        """The smallest along an axis, which stays with length 1."""
        near = self.near.amin(dim, keepdim=True)
        return _Pair(near, torch.where(self.near <= near, self.rest, BEYOND).amin(dim, keepdim=True))

    def beside(self, other: _Pair, dim: int) -> _Pair:
        """Both along an axis."""
        return _Pair(torch.cat([self.near, other.near], dim), torch.cat([self.rest, other.rest], dim))

    def grained(self) -> _Pair:
        """The rests rounded to multiples of 1 / GRAIN."""
        return _Pair(self.near, torch.floor(self.rest * GRAIN + 0.5) * (1.0 / GRAIN))

    def times(self, mask: Tensor) -> _Pair:
        """The numbers where the mask is 1 and 0 where it is 0."""
        return _Pair(self.near * mask, self.rest * mask)

    def plus(self, other: _Pair) -> _Pair:
        """The sum of numbers of which one is 0."""
        return _Pair(self.near + other.near, self.rest + other.rest)

    def reshape(self, *shape: int) -> _Pair:
        """Both in another shape."""
        return _Pair(self.near.reshape(shape), self.rest.reshape(shape))


class ComparingPruner(nn.Module):
    """Keep `spec.keep` of N image tokens: `TokenPruner`'s interface and choices, in the dtype of the features.

    In float32 it differs from `reference.prune` only where two numbers tie to the last bits, because it adds up in
    another order. In float16, with products that add up in float32, similarities are right to 3e-6 or so, and closer
    choices fall either way.

    Source: arXiv 2512.02700; the static form is our own.

    Raises:
        SpecError: more than MOST_TOKENS tokens, more than MOST_COUNTED channels or levels, shapes that do not fit, or
            (outside an exported program) features that are not finite.
    """

    places: Tensor
    earlier: Tensor
    same: Tensor
    powers: Tensor
    per_token: Tensor
    buffering: Tensor
    thresholds: Tensor

    def __init__(self, spec: PruneSpec) -> None:
        super().__init__()
        if spec.tokens > MOST_TOKENS:
            raise SpecError(
                f"grid={spec.grid} has {spec.tokens} tokens; the float16 form can place {MOST_TOKENS} at most"
            )
        for what, count in (("channels", spec.channels), ("threshold levels", len(spec.levels()))):
            if count > MOST_COUNTED:
                raise SpecError(f"{count} {what} are too many; the float16 form can count {MOST_COUNTED} at most")
        self.spec = spec
        self.steps = spec.default_steps if spec.steps is None else min(spec.steps, spec.sure_steps)
        at = torch.arange(spec.tokens)
        constants = {
            "places": torch.arange(max(spec.tokens, spec.channels + 1, len(spec.levels()))).float()[None, None],
            "earlier": (at[None, :] < at[:, None]).float()[None],  # [i, j] is 1 where j comes before i
            "same": torch.eye(spec.tokens)[None],
            "powers": 2.0 ** torch.arange(SMALLEST, LARGEST).float()[None, None],
            "per_token": _parts(torch.full((1, 1), spec.tokens**-0.5, dtype=torch.float64)) * torch.tensor([1.0, UNIT]),
            "buffering": _parts(squared_distances(spec).sqrt() * spec.distance_slope * UNIT),
            "thresholds": _parts((1.0 - torch.tensor(spec.levels(), dtype=torch.float64)[None]) * UNIT),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)

    def forward(self, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        tokens, indices, _ = self.select(keys, hidden)
        return tokens, indices

    def select(self, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Like `forward`, and (B, 1): how many tokens the fill rule had to choose because the steps ran out."""
        exporting = torch.compiler.is_exporting()
        (check_shapes if exporting else check_features)(keys, hidden, self.spec)
        apart = self._apart(hidden)
        chosen, filled = self._expand(apart, self._pivots(keys))
        pick = self._pick(chosen)
        tokens = torch.bmm(self._recovery(apart, chosen, pick), hidden)
        indices = (pick * self._tokens()).sum(2)
        return tokens, indices if exporting else indices.long(), filled.view(-1, 1)

    def _pivots(self, keys: Tensor) -> Tensor:
        """1 where a token is a pivot: (B, N, Dk) -> (B, 1, N)."""
        batch, count, width = keys.shape
        keys = keys * self._scale(keys.abs().amax((1, 2), keepdim=True))[1]
        length = (keys * keys).sum(2, keepdim=True).amax(1, keepdim=True).sqrt()
        keys = keys * self._scale(length * (1.0 / LONGEST))[1]
        each = self.same[:, :1, :1].expand(batch * count, -1, -1)

        def sums(left: Tensor, right: Tensor) -> _Pair:
            """Per token over its channels: twice (B, N, Dk) -> (B, 1, N)."""
            flat = left.reshape(batch * count, 1, width), right.reshape(batch * count, width, 1)
            return _product(*flat, each).grained().reshape(batch, 1, count)

        newest = self._first_largest(sums(keys.abs(), keys * 0.0 + 1.0 / LONGEST))
        selected, nearest = newest, None
        for _ in range(1, self.spec.first_pivots):
            away = keys - torch.bmm(newest, keys)
            distance = sums(away, away)
            nearest = distance if nearest is None else nearest.beside(distance, 1).least(1)
            # Selected tokens are out of reach, so that identical keys still give distinct pivots.
            newest = self._first_largest(_Pair(nearest.near - selected * (2.0 * BEYOND), nearest.rest))
            selected = selected + newest
        return selected

    def _apart(self, hidden: Tensor) -> _Pair:
        """1 - cosine similarity on the channels of largest variance, in units: (B, N, D) -> (B, N, N)."""
        if hidden.shape[2] > self.spec.channels:
            hidden = hidden * self._strongest(hidden)
        row = hidden * self._scale(hidden.abs().amax(2, keepdim=True))[1]
        row = row * self._scale((row * row).sum(2, keepdim=True).sqrt())[1]
        same = self.same.expand(len(hidden), -1, -1)
        products = _product(row * UNIT, row.transpose(1, 2), same)
        square = _Pair(*((part * same).sum(2, keepdim=True) for part in products))
        shorten = self._one_over_root(square)
        # Twice each row over its token's length, the second time of the transposed.
        left = torch.cat([same * shorten.near, same * shorten.rest, same * shorten.near], 2)
        half = _product(left, _stacked(products), same)
        turned = _Pair(half.near.transpose(1, 2), half.rest.transpose(1, 2))
        one = row[:, :, :1] * 0.0 + 1.0
        unit = one.transpose(1, 2) * UNIT
        return _product(torch.cat([-left, one], 2), torch.cat([_stacked(turned), unit], 1), same).grained()

    @staticmethod
    def _one_over_root(square: _Pair) -> _Pair:
        """1 over the root of numbers in units, with the rest in 1 / UNIT: (B, N, 1) -> (B, N, 1)."""
        shape = square.near.shape
        first = 1.0 / (square.near * (1.0 / UNIT)).clamp(min=LEAST).sqrt()
        one = first * 0.0 + 1.0
        each = one.reshape(-1, 1, 1)

        def dot(left: list[Tensor], right: list[Tensor]) -> _Pair:
            flat = torch.cat(left, 2).reshape(-1, 1, len(left)), torch.cat(right, 2).reshape(-1, len(right), 1)
            return _product(*flat, each).reshape(*shape)

        times_first = dot([square.near, square.rest], [first, first])
        missing = dot([one * UNIT, times_first.near, times_first.rest], [one, -first, -first])  # 1 - square / root^2
        return _Pair(first, first * (missing.near * 0.5))

    def _strongest(self, hidden: Tensor) -> Tensor:
        """1 for the channels of largest variance, 0 for the others: (B, N, D) -> (B, 1, D)."""
        batch, count, width = hidden.shape
        mean = hidden.mean(1, keepdim=True)
        centred = hidden - mean
        reach = centred.abs().amax(1, keepdim=True)
        share = centred / reach.clamp(min=LEAST)
        deviation = reach * (share * share).mean(1, keepdim=True).sqrt()  # without squares beyond float16
        biased = (mean.abs() > deviation * BIASED).to(hidden.dtype)
        scale, inverse = self._scale(deviation.transpose(1, 2))
        scaled = (hidden - mean * biased).transpose(1, 2) * inverse
        # The sum of squares less the square of the sum, in one product. `per_token` is 1 / sqrt(N).
        one = scaled[:, :, :1] * 0.0 + 1.0
        weights = self.per_token.expand(batch, count, 2).transpose(1, 2).reshape(batch, 2 * count, 1)
        total = _product(torch.cat([scaled, scaled * (1.0 / UNIT)], 2), weights, one[:, :1])
        left = torch.cat([scaled, total.near, total.near, one], 2).reshape(batch * width, 1, count + 3)
        right = torch.cat([scaled, -total.near, total.rest * -2.0, one * (0.5 * count)], 2)
        each = one.reshape(batch * width, 1, 1)
        variance = _product(left, right.reshape(batch * width, count + 3, 1), each).grained().reshape(batch, 1, width)
        # Grows with the variance, across the scales too.
        order = variance.near * 0.5 ** math.ceil(math.log2(count)) * scale.transpose(1, 2)
        lowest = order.topk(self.spec.channels, dim=2).values[:, :, -1:]
        certain, tied = (order > lowest).to(order.dtype), order == lowest
        room = float(self.spec.channels) - certain.sum(2, keepdim=True)
        rests = torch.where(tied, variance.rest, -BEYOND).topk(self.spec.channels, dim=2).values
        last = (self.places[:, :, 1 : self.spec.channels + 1] == room).to(order.dtype)
        enough = variance.rest >= (rests * last).sum(2, keepdim=True)
        return certain + (tied & enough).to(order.dtype)

    def _expand(self, apart: _Pair, pivots: Tensor) -> tuple[Tensor, Tensor]:
        """Centrifugal expansion: (B, 1, N) with 1 for the `keep` tokens that stay, and how many of them filled up.

        A step accepts from the first batch of the running pass that has something to accept. Tokens are scored by one
        minus their adjusted similarity.
        """
        size, keep, dtype = min(self.spec.token_batch, self.spec.tokens), float(self.spec.keep), pivots.dtype
        nothing = pivots[:, :, :1] * 0.0
        one = nothing + 1.0
        buffering = _settled(*(part * one for part in self.buffering.unbind(-1)))
        both = apart.beside(buffering, 1)
        thresholds = _settled(*(part * one for part in self.thresholds.unbind(-1)))
        places = self.places[:, :, : self.thresholds.shape[1]]
        nearest = self._nearest(both, pivots)
        selected = pivots
        when = (1.0 - pivots) * (self.steps + 1.0)  # pivots come first, tokens that no step reaches last
        scored = _Pair(pivots * 0.0, pivots * 0.0)
        limit = _Pair(nothing, nothing)
        level = rank = behind = nothing  # a pass: its number, places, and how many are done
        for number in range(self.steps):
            score = self._score(nearest)
            left = _Pair(score.near - selected * BEYOND, score.rest)
            if number % RANK_EVERY == 0:
                # A new pass if the running one has nothing left to accept; levels that accept nothing are skipped.
                going_on = nothing
                if number:
                    going_on = (left.exceeds(limit) & (rank >= behind)).to(dtype).amax(2, keepdim=True)
                begin = 1.0 - going_on
                best = _Pair(-left.near, -left.rest).least(2)
                useful = _Pair(-thresholds.near, -thresholds.rest).exceeds(best).to(dtype)
                useless = (1.0 - useful).sum(2, keepdim=True)
                useful = torch.maximum(useless, level + 1.0) if number else useless
                level = level * going_on + useful * begin
                at_level = thresholds.times((places == level).to(dtype))
                limit = _Pair(at_level.near.sum(2, keepdim=True), at_level.rest.sum(2, keepdim=True))
                rank = rank * going_on + self._rank(left) * begin
                behind = behind * going_on
            accept = left.exceeds(limit) & (rank >= behind)
            first = torch.where(accept, rank, BEYOND).amin(2, keepdim=True)
            behind = (torch.floor((first + 0.5) * (1.0 / size)) + 1.0) * size
            taken = (accept & (rank < behind)).to(dtype)
            when = when - taken * float(self.steps - number)
            scored = scored.plus(score.times(taken))
            selected = selected + taken
            nearest = nearest.beside(self._nearest(both, taken), 2).least(2)
        scored = scored.plus(self._score(nearest).times(1.0 - selected))
        filled = torch.relu(keep - selected.sum(2))
        return (self._rank(scored, before=when) < keep).to(dtype), filled

    @staticmethod
    def _nearest(both: _Pair, tokens: Tensor) -> _Pair:
        """How near each token is to the nearest of some, in features and on the grid: (B, 2N, N) -> (B, 2N, 1)."""
        return _Pair(both.near + (1.0 - tokens) * BEYOND, both.rest).least(2)

    def _score(self, nearest: _Pair) -> _Pair:
        """One minus the similarity times the buffer, in units: (B, 2N, 1) -> (B, 1, N).

        With the distance `a` and the buffer's excess `b`, both times UNIT, that is a b / UNIT - b + a. Sums begin with
        the first terms: where `a` is UNIT, as between tokens that have nothing in common, these two leave nothing.
        """
        count, share = self.spec.tokens, 1.0 / UNIT
        (a, b), (a_rest, b_rest) = ((part[:, :count], part[:, count:]) for part in nearest)
        one, half = a * 0.0 + 1.0, UNIT**-0.5
        left = torch.cat([a * half, b, a, a * share, b_rest, a_rest, a_rest], 2)
        right = torch.cat([b * half, -one, one, b_rest, -one, one, b * share], 2)
        each = one.reshape(-1, 1, 1)
        return _product(left.reshape(-1, 1, 7), right.reshape(-1, 7, 1), each).grained().reshape(-1, 1, count)

    def _rank(self, score: _Pair, *, before: Tensor | None = None) -> Tensor:
        """Place of each token when the largest score comes first, or the smallest `before`: (B, 1, N) -> (B, 1, N)."""
        own = _Pair(score.near.transpose(1, 2), score.rest.transpose(1, 2))
        ahead = torch.where(score.rest == own.rest, self.earlier, (score.rest > own.rest).to(score.near.dtype))
        ahead = torch.where(score.near == own.near, ahead, (score.near > own.near).to(ahead.dtype))
        if before is not None:
            since = before.transpose(1, 2)
            ahead = torch.where(before == since, ahead, (before < since).to(ahead.dtype))
        return ahead.sum(2)[:, None]

    def _pick(self, chosen: Tensor) -> Tensor:
        """One-hot rows of the kept tokens in ascending position: (B, 1, N) -> (B, keep, N)."""
        place = (self.earlier * chosen).sum(2)[:, None]
        return (place == self._slots()).to(chosen.dtype) * chosen

    def _recovery(self, apart: _Pair, chosen: Tensor, pick: Tensor) -> Tensor:
        """The matrix that picks the kept tokens and mixes the dropped ones into them: (B, keep, N)."""
        to_kept = _Pair(torch.bmm(pick, apart.near), torch.bmm(pick, apart.rest))
        slot = torch.where(to_kept.exceeds(to_kept.least(1)), BEYOND, self._slots()).amin(1, keepdim=True)
        similarity = ((UNIT - to_kept.near) - to_kept.rest) * (1.0 / UNIT)
        weight = (self._slots() == slot).to(pick.dtype) * similarity * (1.0 - chosen)
        total = weight.sum(2, keepdim=True)
        mixed = (total > weight.abs().sum(2, keepdim=True) * CANCELLATION).to(pick.dtype) * self.spec.recovery
        return pick * (1.0 - mixed) + weight * (mixed / total.clamp(min=LEAST))

    def _slots(self) -> Tensor:
        """A column of 0, 1, 2 ...: (1, keep, 1)."""
        return self.places[:, :, : self.spec.keep].transpose(1, 2)

    def _tokens(self) -> Tensor:
        """A row of 0, 1, 2 ...: (1, 1, N)."""
        return self.places[:, :, : self.spec.tokens]

    def _first_largest(self, score: _Pair) -> Tensor:
        """One-hot of the first largest element of a row: (B, 1, N) -> (B, 1, N)."""
        rest = torch.where(score.near >= score.near.amax(2, keepdim=True), score.rest, -BEYOND)
        first = torch.where(rest >= rest.amax(2, keepdim=True), self._tokens(), BEYOND).amin(2, keepdim=True)
        return (self._tokens() == first).to(rest.dtype)

    def _scale(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """The power of two above each size, and its inverse, which brings it into 1/2 .. 1: (B, M, 1) twice."""
        large = size >= self.powers
        above = torch.where(large, self.powers * 2.0, 2.0**SMALLEST).amax(2, keepdim=True)
        return above, torch.where(large, 0.5 / self.powers, 2.0**-SMALLEST).amin(2, keepdim=True)


def _parts(values: Tensor) -> Tensor:
    """The nearest float16 of each number and what it leaves: (...) -> (..., 2)."""
    near = values.half().double()
    return torch.stack([near, values.double() - near], -1)


def _stacked(pair: _Pair) -> Tensor:
    """What a product takes on its right for a pair, times a number, its rest in 1 / UNIT and the number again."""
    return torch.cat([pair.near, pair.near * (1.0 / UNIT), pair.rest], 1)


def _settled(near: Tensor, rest: Tensor) -> _Pair:
    """The pair of a sum."""
    total = near + rest
    return _Pair(total, (near - total) + rest).grained()


def _product(left: Tensor, right: Tensor, identity: Tensor) -> _Pair:
    """Matrix product as pairs: (B, M, K), (B, K, N) and the identity (B, N, N) -> (B, M, N)."""
    near = torch.bmm(left, right)
    return _Pair(near, torch.bmm(torch.cat([left, -near], 2), torch.cat([right, identity], 1)))
